"""Tensors as they lie in memory."""

from __future__ import annotations

from torch import Tensor


def storage_order(tensor: Tensor) -> list[int]:
    """Its dimensions, the outermost in memory first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def in_storage_order(tensor: Tensor, like: Tensor) -> Tensor:
    """1-d, in the order in which ``like`` lies in memory; a view where ``tensor`` lies so too."""
    return tensor.permute(storage_order(like)).reshape(-1)


def is_laid_out_like(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike."""
    return a.stride() == b.stride() or all(
        size == 1 or i == j for size, i, j in zip(b.shape, a.stride(), b.stride(), strict=True)
    )
