"""`block_forward`; see `kernels.interface`.

Shapes: N images, C channels, H W height and width; a window is one of the max-pool's (a single
position where there is none), a cell a rectangle of windows.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, check_dtypes
from locallearn.kernels.interface import BlockForward, ChannelStats, Moments
from locallearn.kernels.triton.common import (
    OPTIONS,
    cell_range,
    load_channels,
    memory_format,
    normalize,
    tile_for,
    view,
)


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
    check_dtypes("triton", z)
    height, width = view(z)[2:4]
    out_height, out_width = height // max_pool, width // max_pool
    shape = [*z.shape[:2], out_height, out_width][: z.ndim]
    output = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=memory_format(z))
    per_channel = [t.contiguous() for t in (*stats, gamma, beta)]
    if latent_size is None:
        # Any rectangles will do: a row of windows for each program.
        _launch(z, per_channel, negative_slope, max_pool, (out_height, 1), output, None)
        return BlockForward(output, None)

    cells = latent_size if z.ndim == 4 else 1
    moments = _empty_moments(z, cells)
    if is_one_pass(height, width, cells, max_pool):
        _launch(z, per_channel, negative_slope, max_pool, (cells, cells), output, moments)
    else:
        _launch(z, per_channel, negative_slope, 1, (cells, cells), None, moments)
        _launch(z, per_channel, negative_slope, max_pool, (out_height, 1), output, None)
    return BlockForward(output, moments)


def is_one_pass(height: int, width: int, cells: int, max_pool: int) -> bool:
    """Whether every cell consists of whole windows of the max-pool, and none overlap."""
    return height % (cells * max_pool) == 0 and width % (cells * max_pool) == 0


def _empty_moments(z: Tensor, cells: int) -> Moments:
    shape = [*z.shape[:2], cells, cells][: z.ndim]
    layout = memory_format(z)
    s0, s1 = (
        torch.empty(shape, dtype=torch.float32, device=z.device, memory_format=layout)
        for _ in range(2)
    )
    return Moments(s0, s1)


def _launch(
    z: Tensor,
    per_channel: list[Tensor],
    negative_slope: float,
    max_pool: int,
    cells: tuple[int, int],
    output: Tensor | None,
    moments: Moments | None,
) -> None:
    of_z = view(z)
    height, width = of_z.height // max_pool, of_z.width // max_pool
    num_cells = cells[0] * cells[1]
    if not of_z.num_images * num_cells * height * width:
        return
    windows_of_a_cell = ceil_div(height, cells[0]) * ceil_div(width, cells[1])
    tile = tile_for(windows_of_a_cell, of_z.num_channels)
    s0, s1 = moments or (None, None)
    _block_forward_kernel[
        (of_z.num_images * num_cells, ceil_div(of_z.num_channels, tile.channels))
    ](
        z,
        output,
        s0,
        s1,
        *per_channel,
        float(negative_slope),
        of_z.num_channels,
        *of_z.strides,
        *(of_z if output is None else view(output)).strides,
        *(of_z if s0 is None else view(s0)).strides,
        HEIGHT=height,
        WIDTH=width,
        CELLS_H=cells[0],
        CELLS_W=cells[1],
        MAX_POOL=max_pool,
        BLOCK_W=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.num_warps,
        **OPTIONS,
    )


@triton.jit
def _block_forward_kernel(
    z_ptr,
    output_ptr,  # None: moments only
    s0_ptr,  # None: output only
    s1_ptr,
    mean_ptr,
    inv_std_ptr,
    gamma_ptr,
    beta_ptr,
    negative_slope,
    num_channels,
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    s_stride_n,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    HEIGHT: tl.constexpr,  # in windows
    WIDTH: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    MAX_POOL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // (CELLS_H * CELLS_W)).to(tl.int64)
    cell = tl.program_id(0) % (CELLS_H * CELLS_W)
    cell_y = cell // CELLS_W
    cell_x = cell % CELLS_W
    top, num_rows = cell_range(cell_y, HEIGHT, CELLS_H)
    left, num_columns = cell_range(cell_x, WIDTH, CELLS_W)
    num_windows = num_rows * num_columns

    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mean = load_channels(mean_ptr, channel, is_channel)
    inv_std = load_channels(inv_std_ptr, channel, is_channel)
    gamma = load_channels(gamma_ptr, channel, is_channel)
    beta = load_channels(beta_ptr, channel, is_channel)

    z_image = z_ptr + image * z_stride_n + channel[None, :] * z_stride_c
    sum_d = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sum_d_xh = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for first in range(0, num_windows, BLOCK_W):
        window = first + tl.arange(0, BLOCK_W)
        y = top + window // num_columns
        x = left + window % num_columns
        is_window = (window < num_windows)[:, None]
        mask = is_window & is_channel[None, :]
        for dy in tl.static_range(MAX_POOL):
            for dx in tl.static_range(MAX_POOL):
                position = (y * MAX_POOL + dy) * z_stride_h + (x * MAX_POOL + dx) * z_stride_w
                z = tl.load(z_image + position[:, None], mask=mask, other=0.0)
                xh, v, d = normalize(z, mean, inv_std, gamma, beta, negative_slope)
                if s0_ptr is not None:
                    sum_d += tl.where(is_window, d, 0.0)
                    sum_d_xh += tl.where(is_window, d * xh, 0.0)
                if output_ptr is not None:
                    if dy == 0 and dx == 0:
                        highest = v * d
                    else:
                        highest = tl.maximum(highest, v * d, propagate_nan=tl.PropagateNan.ALL)
        if output_ptr is not None:
            out_image = output_ptr + image * out_stride_n + channel[None, :] * out_stride_c
            out_position = y * out_stride_h + x * out_stride_w
            tl.store(out_image + out_position[:, None], highest, mask=mask)

    if s0_ptr is not None:
        size = num_windows * (MAX_POOL * MAX_POOL)
        place = image * s_stride_n + cell_y * s_stride_h + cell_x * s_stride_w
        s_place = place + channel * s_stride_c
        tl.store(s0_ptr + s_place, tl.sum(sum_d, axis=0) / size, mask=is_channel)
        tl.store(s1_ptr + s_place, tl.sum(sum_d_xh, axis=0) / size, mask=is_channel)
