"""Sums over pooling cells, and their adjoint, on (N, H, W, C) tensors.

Where the pooling size divides H and W, a cell is a slice of a view. Elsewhere cells overlap or
repeat, and each is summed by itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

FEW_CHANNELS = 192


def bounds(length: int, size: int) -> list[tuple[int, int]]:
    """First and last (exclusive) position of each cell of adaptive pooling."""
    return [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]


def cell_means(values: Tensor, size: int) -> Tensor:
    """(N, H, W, C) to (N, s, s, C).

    Many channels: rows first and then columns, so that the long loop runs over whole rows of
    memory. Cell by cell it jumps from row to row, which took 9 ms instead of 6 with 256 channels
    (2 cores); with up to 192 nothing is lost by it, and 2 s / H of z is not needed in between.
    """
    n, height, width, channels = values.shape
    if not is_even(height, width, size):
        rows = torch.stack([values[:, a:b].mean(1) for a, b in bounds(height, size)], dim=1)
        return torch.stack([rows[:, :, a:b].mean(2) for a, b in bounds(width, size)], dim=2)
    if channels <= FEW_CHANNELS:
        cells = split(values, size).sum((2, 4))
    else:
        rows = values.view(n, size, height // size, width, channels).sum(2)
        cells = rows.view(n, size, size, width // size, channels).sum(3)
    return cells / (height // size * (width // size))


class Holders(NamedTuple):
    """Which cells hold each of L positions: cell (m, L), int64; weight (m, L), 1 / size or 0."""

    cell: Tensor
    weight: Tensor


@functools.cache
def holders(length: int, size: int, device: torch.device, dtype: torch.dtype) -> Holders:
    """The cells that hold each position along one side; m is the most that any has."""
    cells = bounds(length, size)
    found = [[i for i, (a, b) in enumerate(cells) if a <= y < b] for y in range(length)]
    most = max(map(len, found))
    index = [[held[k] if k < len(held) else 0 for held in found] for k in range(most)]
    weight = [
        [1 / (cells[held[k]][1] - cells[held[k]][0]) if k < len(held) else 0.0 for held in found]
        for k in range(most)
    ]
    return Holders(
        torch.tensor(index, device=device), torch.tensor(weight, device=device, dtype=dtype)
    )


def is_even(height: int, width: int, size: int) -> bool:
    """Whether no two cells overlap."""
    return height % size == 0 and width % size == 0


def split(rows: Tensor, size: int) -> Tensor:
    """(N, H, W, C) as (N, s, H/s, s, W/s, C), where cells do not overlap."""
    n, height, width, channels = rows.shape
    return rows.view(n, size, height // size, size, width // size, channels)


def spread(cells: Tensor, over_rows: Holders, over_columns: Holders) -> Tensor:
    """The adjoint of :func:`cell_means` where cells overlap: (N, s, s, C) to (N, H, W, C)."""
    total = None
    for i, y in zip(over_rows.cell, over_rows.weight, strict=True):
        for j, x in zip(over_columns.cell, over_columns.weight, strict=True):
            part = cells[:, i][:, :, j] * (y[:, None, None] * x[:, None])
            total = part if total is None else total + part
    assert isinstance(total, Tensor)
    return total
