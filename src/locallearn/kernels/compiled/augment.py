"""`augment`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.compiled.compilation import open_batch, specialized
from locallearn.kernels.interface import Crops
from locallearn.kernels.reference import augment as reference


def _augment(
    crops: Crops, mean: Tensor, std: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return reference(crops, mean, std, size=size, dtype=dtype)


@torch.no_grad()
def augment(
    crops: Crops,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    open_batch(*crops)
    return specialized(_augment, *size, len(mean), dtype)(crops, mean, std, size, dtype)
