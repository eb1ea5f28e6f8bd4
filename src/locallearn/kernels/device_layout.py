"""What kernels of a CUDA device ask of tensors, whatever they are written in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locallearn.errors import UserError
from locallearn.kernels.storage_order import is_laid_out_like

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtypes(backend: str, *tensors: Tensor) -> None:
    """Raises UserError for a dtype that the kernels don't take."""
    for t in tensors:
        if t.dtype not in DTYPES:
            raise _refusal(backend, "takes float32, bfloat16 or float16", t.dtype)


def check_image_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raises UserError for a dtype of which the kernels make no images."""
    if dtype not in DTYPES:
        raise _refusal(backend, "makes float32, bfloat16 or float16 images", dtype)


def _refusal(backend: str, does: str, dtype: torch.dtype) -> UserError:
    return UserError(
        f"the {backend} backend {does}, got {str(dtype).removeprefix('torch.')}. Use the compiled "
        f"or reference backend."
    )


# y, g, z and v of one parameter
Quadruple = tuple[Tensor, Tensor, Tensor, Tensor]


def quadruples_of(
    backend: str,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    z: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
) -> list[Quadruple]:
    """What a step goes through, parameter by parameter; a gradient that does not lie in memory like
    its parameter is copied so. Empty ones are left out.

    Raises:
        UserError: a parameter that the kernels don't step.
    """
    quadruples = []
    for y, gradient, z_i, v in zip(parameters, gradients, z, exp_avg_sq, strict=True):
        if y.dtype != torch.float32:
            raise _refusal(backend, "steps float32 parameters", y.dtype)
        if not (is_laid_out_like(gradient, y) and gradient.dtype == y.dtype):
            gradient = torch.empty_like(y).copy_(gradient)
        if y.numel():
            quadruples.append((y, gradient, z_i, v))
    return quadruples


def product(a: Tensor, b: Tensor) -> Tensor:
    """Their matrix product, in their own dtype where autocast is on too."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()
