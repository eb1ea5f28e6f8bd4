"""What kernels of a CUDA device ask of tensors, whatever they are written in."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtypes(backend: str, *tensors: Tensor) -> None:
    """Raises UserError for a dtype that the kernels don't take."""
    for t in tensors:
        if t.dtype not in DTYPES:
            raise UserError(
                f"the {backend} backend takes float32, bfloat16 or float16, got "
                f"{str(t.dtype).removeprefix('torch.')}. Use the compiled or reference backend."
            )


def check_image_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raises UserError for a dtype of which the kernels make no images."""
    if dtype not in DTYPES:
        raise UserError(
            f"the {backend} backend makes float32, bfloat16 or float16 images, got "
            f"{str(dtype).removeprefix('torch.')}. Use the compiled or reference backend."
        )


def check_parameter(backend: str, parameter: Tensor) -> None:
    """Raises UserError for a parameter that the kernels don't step."""
    if parameter.dtype != torch.float32:
        raise UserError(
            f"the {backend} backend steps float32 parameters, got "
            f"{str(parameter.dtype).removeprefix('torch.')}. Use the compiled or reference backend."
        )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()
