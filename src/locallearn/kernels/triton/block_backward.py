"""`block_backward` and `norm_backward`; see `kernels.interface`.

Shapes: N images, C channels, H W height and width; a row is one position of one image.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, check_dtypes, power_of_two
from locallearn.kernels.interface import ChannelStats, NormGradient
from locallearn.kernels.triton.common import (
    OPTIONS,
    cell_range,
    chunks_for,
    load_channels,
    normalize,
    row_offsets,
    row_views,
    tile_for,
    view,
)

_FINISH_CHANNELS = 8


def block_backward(
    z: Tensor,
    grad_latents: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    *,
    negative_slope: float,
) -> Tensor:
    check_dtypes("triton", z)
    of_z, of_grad = view(z), view(grad_latents)
    height, width, cells = of_z.height, of_z.width, of_grad.height
    overlaps = (most_cells_of_a_position(height, cells), most_cells_of_a_position(width, cells))
    # Where no position is in two cells a program owns a cell, and reads its gradient once.
    parts = (cells, cells) if overlaps == (1, 1) else (height, 1)
    rows_of_a_part = ceil_div(height, parts[0]) * ceil_div(width, parts[1])
    tile = tile_for(rows_of_a_part, of_z.num_channels)
    _block_backward_kernel[
        (of_z.num_images * parts[0] * parts[1], ceil_div(of_z.num_channels, tile.channels))
    ](
        z,
        grad_latents,
        *(t.contiguous() for t in (*stats, gamma, beta, grad_gamma, grad_beta)),
        float(negative_slope),
        1 / of_z.num_rows,
        of_z.num_channels,
        *of_z.strides,
        *of_grad.strides,
        HEIGHT=height,
        WIDTH=width,
        CELLS=cells,
        PARTS_H=parts[0],
        PARTS_W=parts[1],
        OVERLAP_H=overlaps[0],
        OVERLAP_W=overlaps[1],
        BLOCK_P=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    return z


@functools.cache
def most_cells_of_a_position(size: int, cells: int) -> int:
    """How many cells hold a position at most, along one side."""
    return max(ceil_div((i + 1) * cells, size) - i * cells // size for i in range(size))


@triton.jit
def _block_backward_kernel(
    z_ptr,
    grad_ptr,
    mean_ptr,
    inv_std_ptr,
    gamma_ptr,
    beta_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    negative_slope,
    inverse_n,
    num_channels,
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    PARTS_H: tl.constexpr,
    PARTS_W: tl.constexpr,
    OVERLAP_H: tl.constexpr,
    OVERLAP_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // (PARTS_H * PARTS_W)).to(tl.int64)
    part = tl.program_id(0) % (PARTS_H * PARTS_W)
    part_y = part // PARTS_W
    part_x = part % PARTS_W
    top, num_rows = cell_range(part_y, HEIGHT, PARTS_H)
    left, num_columns = cell_range(part_x, WIDTH, PARTS_W)
    num_positions = num_rows * num_columns

    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mean = load_channels(mean_ptr, channel, is_channel)
    inv_std = load_channels(inv_std_ptr, channel, is_channel)
    gamma = load_channels(gamma_ptr, channel, is_channel)
    beta = load_channels(beta_ptr, channel, is_channel)
    grad_gamma = load_channels(grad_gamma_ptr, channel, is_channel)
    grad_beta = load_channels(grad_beta_ptr, channel, is_channel)

    z_image = z_ptr + image * z_stride_n + channel[None, :] * z_stride_c
    grad_image = grad_ptr + image * g_stride_n + channel * g_stride_c
    if OVERLAP_H == 1 and OVERLAP_W == 1:
        grad = tl.load(
            grad_image + part_y * g_stride_h + part_x * g_stride_w, mask=is_channel, other=0.0
        )
        grad_of_cell = grad.to(tl.float32)[None, :] / num_positions

    for first in range(0, num_positions, BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        y = top + position // num_columns
        x = left + position % num_columns
        mask = (position < num_positions)[:, None] & is_channel[None, :]
        if OVERLAP_H == 1 and OVERLAP_W == 1:
            grad_h = grad_of_cell
        else:
            grad_h = _unpool(
                grad_image, g_stride_h, g_stride_w, y, x, mask,
                HEIGHT, WIDTH, CELLS, OVERLAP_H, OVERLAP_W, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        place = z_image + (y * z_stride_h + x * z_stride_w)[:, None]
        z = tl.load(place, mask=mask, other=0.0)
        xh, _v, d = normalize(z, mean, inv_std, gamma, beta, negative_slope)
        mean_grad = (grad_beta + xh * grad_gamma) * inverse_n
        tl.store(place, gamma * inv_std * (d * grad_h - mean_grad), mask=mask)


@triton.jit
def _unpool(
    grad_image,
    g_stride_h,
    g_stride_w,
    y,
    x,
    mask,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    OVERLAP_H: tl.constexpr,
    OVERLAP_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum, over the cells that hold a position, of gradient / size."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(OVERLAP_H):
        cell_y = y * CELLS // HEIGHT + i
        top, num_rows = cell_range(cell_y, HEIGHT, CELLS)
        for j in range(OVERLAP_W):
            cell_x = x * CELLS // WIDTH + j
            left, num_columns = cell_range(cell_x, WIDTH, CELLS)
            # Later cells begin beyond the position; the last ones would begin beyond the image.
            is_held = ((top <= y) & (cell_y < CELLS) & (left <= x) & (cell_x < CELLS))[:, None]
            place = grad_image[None, :] + (cell_y * g_stride_h + cell_x * g_stride_w)[:, None]
            grad = tl.load(place, mask=mask & is_held, other=0.0).to(tl.float32)
            total += grad / (num_rows * num_columns).to(tl.float32)[:, None]
    return total


def norm_backward(
    z: Tensor,
    grad_output: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
) -> NormGradient:
    check_dtypes("triton", z, grad_output)
    of_z, of_grad = row_views(z, grad_output)
    num_rows, num_channels = of_z.num_rows, of_z.num_channels
    per_channel = [t.contiguous() for t in (*stats, gamma, beta)]
    strides = (*of_z.strides, *of_grad.strides)

    tile, rows_per_chunk, num_chunks = chunks_for(num_rows, num_channels)
    partial = torch.empty(2, num_chunks, num_channels, dtype=torch.float32, device=z.device)
    _partial_gradients_kernel[(num_chunks, ceil_div(num_channels, tile.channels))](
        z,
        grad_output,
        partial,
        *per_channel,
        float(negative_slope),
        num_rows,
        rows_per_chunk,
        num_channels,
        *strides,
        HEIGHT=of_z.height,
        WIDTH=of_z.width,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    grad_gamma, grad_beta = (
        torch.empty(num_channels, dtype=torch.float32, device=z.device) for _ in range(2)
    )
    _sum_gradients_kernel[(ceil_div(num_channels, _FINISH_CHANNELS),)](
        partial,
        grad_gamma,
        grad_beta,
        num_chunks,
        num_channels,
        BLOCK_CHUNKS=power_of_two(num_chunks),
        BLOCK_C=_FINISH_CHANNELS,
        **OPTIONS,
    )
    tile = tile_for(num_rows, num_channels)
    _norm_backward_kernel[(ceil_div(num_rows, tile.rows), ceil_div(num_channels, tile.channels))](
        z,
        grad_output,
        *per_channel,
        grad_gamma,
        grad_beta,
        float(negative_slope),
        1 / num_rows,
        num_rows,
        num_channels,
        *strides,
        HEIGHT=of_z.height,
        WIDTH=of_z.width,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    return NormGradient(z, grad_gamma, grad_beta)


@triton.jit
def _partial_gradients_kernel(
    z_ptr,
    grad_ptr,
    partial_ptr,  # (2, chunks, C): of dL/dgamma and of dL/dbeta
    mean_ptr,
    inv_std_ptr,
    gamma_ptr,
    beta_ptr,
    negative_slope,
    num_rows,
    rows_per_chunk,
    num_channels,
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
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
    mean = load_channels(mean_ptr, channel, is_channel)
    inv_std = load_channels(inv_std_ptr, channel, is_channel)
    gamma = load_channels(gamma_ptr, channel, is_channel)
    beta = load_channels(beta_ptr, channel, is_channel)

    sum_gamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_beta = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & is_channel[None, :]
        z_row = row_offsets(row, z_stride_n, z_stride_h, z_stride_w, HEIGHT, WIDTH)
        g_row = row_offsets(row, g_stride_n, g_stride_h, g_stride_w, HEIGHT, WIDTH)
        z = tl.load(z_ptr + z_row[:, None] + channel[None, :] * z_stride_c, mask=mask, other=0.0)
        # Outside the rows the gradient is zero, and so is all that it adds.
        g = tl.load(grad_ptr + g_row[:, None] + channel[None, :] * g_stride_c, mask=mask, other=0.0)
        xh, _v, d = normalize(z, mean, inv_std, gamma, beta, negative_slope)
        grad_v = d * g.to(tl.float32)
        sum_gamma += grad_v * xh
        sum_beta += grad_v

    place = partial_ptr + chunk * num_channels + channel
    tl.store(place, tl.sum(sum_gamma, axis=0), mask=is_channel)
    place += tl.num_programs(0) * num_channels
    tl.store(place, tl.sum(sum_beta, axis=0), mask=is_channel)


@triton.jit
def _sum_gradients_kernel(
    partial_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    num_chunks,
    num_channels,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.arange(0, BLOCK_CHUNKS)[:, None]
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mask = (chunk < num_chunks) & is_channel[None, :]
    place = partial_ptr + chunk * num_channels + channel[None, :]
    of_gamma = tl.load(place, mask=mask, other=0.0)
    of_beta = tl.load(place + num_chunks * num_channels, mask=mask, other=0.0)
    tl.store(grad_gamma_ptr + channel, tl.sum(of_gamma, axis=0), mask=is_channel)
    tl.store(grad_beta_ptr + channel, tl.sum(of_beta, axis=0), mask=is_channel)


@triton.jit
def _norm_backward_kernel(
    z_ptr,
    grad_ptr,
    mean_ptr,
    inv_std_ptr,
    gamma_ptr,
    beta_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    negative_slope,
    inverse_n,
    num_rows,
    num_channels,
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    mean = load_channels(mean_ptr, channel, is_channel)
    inv_std = load_channels(inv_std_ptr, channel, is_channel)
    gamma = load_channels(gamma_ptr, channel, is_channel)
    beta = load_channels(beta_ptr, channel, is_channel)
    grad_gamma = load_channels(grad_gamma_ptr, channel, is_channel)
    grad_beta = load_channels(grad_beta_ptr, channel, is_channel)

    z_row = row_offsets(row, z_stride_n, z_stride_h, z_stride_w, HEIGHT, WIDTH)
    g_row = row_offsets(row, g_stride_n, g_stride_h, g_stride_w, HEIGHT, WIDTH)
    place = z_ptr + z_row[:, None] + channel[None, :] * z_stride_c
    z = tl.load(place, mask=mask, other=0.0)
    g = tl.load(grad_ptr + g_row[:, None] + channel[None, :] * g_stride_c, mask=mask, other=0.0)
    xh, _v, d = normalize(z, mean, inv_std, gamma, beta, negative_slope)
    mean_grad = (grad_beta + xh * grad_gamma) * inverse_n
    tl.store(place, gamma * inv_std * (d * g.to(tl.float32) - mean_grad), mask=mask)
