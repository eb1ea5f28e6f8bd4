"""`block_forward`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.compiled.cells import cell_means
from locallearn.kernels.compiled.compilation import (
    open_batch,
    open_rows,
    rows_of,
    specialized,
)
from locallearn.kernels.interface import BlockForward, ChannelStats, Moments


def parts(
    rows: Tensor, stats: ChannelStats, gamma: Tensor, beta: Tensor, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """xh, v and d, in the statistics' dtype."""
    xh = (rows.to(stats.mean.dtype) - stats.mean) * stats.inv_std
    v = gamma * xh + beta
    # Of two numbers torch.where makes a float32.
    return xh, v, torch.where(v > 0, v.new_ones(()), v.new_full((), negative_slope))


def _max_pool(rows: Tensor, size: int) -> Tensor:
    """(N, H, W, C), the maximum of strided slices: Inductor's own max-pool keeps indices."""
    n, height, width, channels = rows.shape
    tall, wide = height // size, width // size
    whole = rows[:, : tall * size, : wide * size]
    split = whole.reshape(n, tall, size, wide, size, channels)
    output = split[:, :, 0, :, 0]
    for i in range(size):
        for j in range(size):
            output = torch.maximum(output, split[:, :, i, :, j])
    return output


def _block_forward(
    rows: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
    beta: Tensor,
    negative_slope: float,
    latent_size: int | None,
    max_pool: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    stats = ChannelStats(mean, inv_std)
    xh, v, d = parts(rows, stats, gamma, beta, negative_slope)
    output = v * d
    if max_pool > 1:
        output = _max_pool(output, max_pool)
    output = output.to(rows.dtype)
    if latent_size is None:
        return output, None, None
    if rows.ndim == 2:
        return output, d, d * xh
    return output, cell_means(d, latent_size), cell_means(d * xh, latent_size)


def _activate(
    rows: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
    beta: Tensor,
    negative_slope: float,
) -> Tensor:
    _, v, d = parts(rows, ChannelStats(mean, inv_std), gamma, beta, negative_slope)
    return (v * d).to(rows.dtype)


@torch.no_grad()
def block_forward(
    z: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
    latent_size: int | None,
    max_pool: int = 1,
) -> BlockForward:
    rows = rows_of(z).contiguous()
    if latent_size is None and max_pool == 1:
        flat = rows.view(z.shape[0], -1, z.shape[1])
        key = (*open_rows(flat), rows.dtype, gamma.dtype, negative_slope)
        output = specialized(_activate, *key)(flat, *stats, gamma, beta, negative_slope)
        output = output.view(rows.shape)
        return BlockForward(output if z.ndim == 2 else output.permute(0, 3, 1, 2), None)
    open_batch(rows)
    key = (*rows.shape[1:], latent_size, max_pool, rows.dtype, gamma.dtype, negative_slope)
    output, s0, s1 = specialized(_block_forward, *key)(
        rows, *stats, gamma, beta, negative_slope, latent_size, max_pool
    )
    moments = None if s0 is None or s1 is None else Moments(s0, s1)
    if z.ndim == 2:
        return BlockForward(output, moments)
    if moments is not None:
        moments = Moments(*(each.permute(0, 3, 1, 2) for each in moments))
    return BlockForward(output.permute(0, 3, 1, 2), moments)
