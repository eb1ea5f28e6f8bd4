"""`channel_stats`; see `kernels.interface`.

Shapes: C channels; a row is one position of one image. A chunk of rows leaves three numbers for
each channel: a value near its own mean, the mean deviation from that value, and the sum of squared
deviations from the chunk's mean. The chunks are then combined as Chan et al. do (1979).
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, check_dtypes, power_of_two
from locallearn.kernels.interface import ChannelStats
from locallearn.kernels.triton.common import OPTIONS, chunks_for, row_offsets, row_views

_FINISH_CHANNELS = 8


def channel_stats(
    z: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float,
    momentum: float = 0.1,
) -> ChannelStats:
    check_dtypes("triton", z)
    (of_z,) = row_views(z)
    num_rows, num_channels = of_z.num_rows, of_z.num_channels
    tile, rows_per_chunk, num_chunks = chunks_for(num_rows, num_channels)
    partial = torch.empty(3, num_chunks, num_channels, dtype=torch.float32, device=z.device)
    _partial_stats_kernel[(num_chunks, ceil_div(num_channels, tile.channels))](
        z,
        partial,
        num_rows,
        rows_per_chunk,
        num_channels,
        *of_z.strides,
        HEIGHT=of_z.height,
        WIDTH=of_z.width,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    mean, inv_std = (
        torch.empty(num_channels, dtype=torch.float32, device=z.device) for _ in range(2)
    )
    _channel_stats_kernel[(ceil_div(num_channels, _FINISH_CHANNELS),)](
        partial,
        mean,
        inv_std,
        running_mean,
        running_var,
        eps,
        momentum,
        num_rows,
        rows_per_chunk,
        num_chunks,
        num_channels,
        BLOCK_CHUNKS=power_of_two(num_chunks),
        BLOCK_C=_FINISH_CHANNELS,
        **OPTIONS,
    )
    return ChannelStats(mean, inv_std)


@triton.jit
def _partial_stats_kernel(
    z_ptr,
    partial_ptr,  # (3, chunks, C)
    num_rows,
    rows_per_chunk,
    num_channels,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(0)
    begin = chunk * rows_per_chunk
    end = tl.minimum(begin + rows_per_chunk, num_rows)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    z_channel = z_ptr + channel[None, :] * stride_c

    # The mean of the first rows. Were the others far from it, the variance would be so large that
    # the digits lost are not missed: the first rows are a share of what it is the variance of.
    row = begin + tl.arange(0, BLOCK_R)
    mask = (row < end)[:, None] & is_channel[None, :]
    place = row_offsets(row, stride_n, stride_h, stride_w, HEIGHT, WIDTH)[:, None]
    z = tl.load(z_channel + place, mask=mask, other=0.0).to(tl.float32)
    near = tl.sum(z, axis=0) / tl.minimum(end - begin, BLOCK_R)

    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        is_row = (row < end)[:, None]
        place = row_offsets(row, stride_n, stride_h, stride_w, HEIGHT, WIDTH)[:, None]
        z = tl.load(z_channel + place, mask=is_row & is_channel[None, :], other=0.0).to(tl.float32)
        deviation = tl.where(is_row, z - near[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation

    count = end - begin
    total = tl.sum(sums, axis=0)
    place = partial_ptr + chunk * num_channels + channel
    step = tl.num_programs(0) * num_channels
    tl.store(place, near, mask=is_channel)
    tl.store(place + step, total / count, mask=is_channel)
    spread = tl.sum(squares, axis=0) - total * (total / count)
    spread = tl.maximum(spread, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place + 2 * step, spread, mask=is_channel)


@triton.jit
def _channel_stats_kernel(
    partial_ptr,
    mean_ptr,
    inv_std_ptr,
    running_mean_ptr,  # None: not kept
    running_var_ptr,
    eps,
    momentum,
    num_rows,
    rows_per_chunk,
    num_chunks,
    num_channels,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.arange(0, BLOCK_CHUNKS)[:, None]
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mask = (chunk < num_chunks) & is_channel[None, :]
    count = tl.minimum(num_rows - chunk * rows_per_chunk, rows_per_chunk).to(tl.float32)
    count = tl.where(chunk < num_chunks, count, 0.0)

    step = num_chunks * num_channels
    place = partial_ptr + chunk * num_channels + channel[None, :]
    near = tl.load(place, mask=mask, other=0.0)
    deviation = tl.load(place + step, mask=mask, other=0.0)
    spread = tl.load(place + 2 * step, mask=mask, other=0.0)
    # All means are taken from one value near them, so that a large one costs no digits.
    origin = tl.load(partial_ptr + channel, mask=is_channel, other=0.0)
    deviation += near - origin[None, :]
    mean_deviation = tl.sum(deviation * count, axis=0) / num_rows
    apart = deviation - mean_deviation[None, :]
    spread = tl.sum(spread + apart * apart * count, axis=0)

    mean = origin + mean_deviation
    tl.store(mean_ptr + channel, mean, mask=is_channel)
    tl.store(inv_std_ptr + channel, tl.rsqrt(spread / num_rows + eps), mask=is_channel)
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + channel, mask=is_channel, other=0.0)
        running_mean += (mean - running_mean) * momentum
        tl.store(running_mean_ptr + channel, running_mean, mask=is_channel)
    if running_var_ptr is not None:
        unbiased = spread / (num_rows - 1)
        running_var = tl.load(running_var_ptr + channel, mask=is_channel, other=0.0)
        running_var += (unbiased - running_var) * momentum
        tl.store(running_var_ptr + channel, running_var, mask=is_channel)
