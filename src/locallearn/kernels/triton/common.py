"""What the kernels share: how they see a tensor, how large a piece a program takes, jit helpers.

Shapes: N images, C channels, H W height and width. An (N, F) tensor is one of N images of one
position with F channels. A row is one position of one image, with all its channels.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803 - a kernel's constants are upper-case, as everywhere in Triton

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, power_of_two

# Of every launch. Multiply-adds are fused up to Triton 3.9, which warns that 3.10 will not.
OPTIONS = {"enable_fp_fusion": True}

# Eight for each thread: in a half-precision type, one 16-byte load.
_ELEMENTS_OF_A_WARP = 256


class View(NamedTuple):
    """Sizes, and strides in elements."""

    num_images: int
    num_channels: int
    height: int
    width: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self[4:]

    @property
    def num_rows(self) -> int:
        return self.num_images * self.height * self.width


class Tile(NamedTuple):
    """What a program works on at a time: powers of two, and the warps for it."""

    rows: int
    channels: int
    num_warps: int


class Chunks(NamedTuple):
    """How the rows are shared out to programs that each leave a partial sum."""

    tile: Tile
    rows_per_chunk: int
    num_chunks: int


# Few enough that one program adds up what they leave in one go.
MAX_CHUNKS = 256


def view(t: Tensor) -> View:
    if t.ndim == 2:
        return View(t.shape[0], t.shape[1], 1, 1, t.stride(0), t.stride(1), 0, 0)
    n, c, h, w = t.shape
    return View(n, c, h, w, *t.stride())


def row_views(*tensors: Tensor) -> list[View]:
    """Views of tensors of one shape, as images of one position where their memory allows.

    A kernel that visits rows in any order then finds each by one product, without divisions.
    """
    views = [view(t) for t in tensors]
    if all(_is_collapsible(v) for v in views):
        return [
            View(v.num_rows, v.num_channels, 1, 1, _row_stride(v), v.stride_c, 0, 0) for v in views
        ]
    return views


def _is_collapsible(v: View) -> bool:
    is_row_dense = v.height == 1 or v.stride_h == v.width * v.stride_w
    return v.height == v.width == 1 or (
        is_row_dense and v.stride_n == v.height * v.width * v.stride_w
    )


def _row_stride(v: View) -> int:
    return v.stride_n if v.height == v.width == 1 else v.stride_w


def memory_format(t: Tensor) -> torch.memory_format:
    """That of a new tensor beside t: channels-last unless t is plainly contiguous."""
    if t.ndim != 4 or (t.is_contiguous() and not is_channels_last(t)):
        return torch.contiguous_format
    return torch.channels_last


def is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def tile_for(
    num_rows: int, num_channels: int, *, num_elements: int = 1024, max_channels: int = 128
) -> Tile:
    """A tile for num_rows rows of num_channels: whole lines of memory first, then rows."""
    channels = min(power_of_two(num_channels), max_channels)
    rows = min(power_of_two(num_rows), num_elements // channels)
    channels = min(power_of_two(num_channels), num_elements // rows)
    return Tile(rows, channels, max(1, min(4, rows * channels // _ELEMENTS_OF_A_WARP)))


def chunks_for(num_rows: int, num_channels: int) -> Chunks:
    tile = tile_for(num_rows, num_channels, num_elements=2048, max_channels=64)
    num_tiles = ceil_div(num_rows, tile.rows)
    rows_per_chunk = ceil_div(num_tiles, min(num_tiles, MAX_CHUNKS)) * tile.rows
    return Chunks(tile, rows_per_chunk, ceil_div(num_rows, rows_per_chunk))


@triton.jit
def cell_range(i, SIZE: tl.constexpr, CELLS: tl.constexpr):
    """First position and number of positions of cell i of CELLS along a side of SIZE."""
    if SIZE % CELLS == 0:
        start = i * (SIZE // CELLS)
        length = SIZE // CELLS
    else:
        start = i * SIZE // CELLS
        length = ((i + 1) * SIZE + CELLS - 1) // CELLS - start
    return start, length


@triton.jit
def row_offsets(row, stride_n, stride_h, stride_w, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Where rows begin; in 64 bits, since a batch may be larger than 2^31 elements."""
    image = (row // (HEIGHT * WIDTH)).to(tl.int64)
    y = row // WIDTH % HEIGHT
    x = row % WIDTH
    return image * stride_n + y * stride_h + x * stride_w


@triton.jit
def load_channels(ptr, channel, is_channel):
    """(1, block) float32, one value for each channel."""
    return tl.load(ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalize(z, mean, inv_std, gamma, beta, negative_slope):
    """xh, v and d of the notation in `kernels.interface`."""
    xh = (z.to(tl.float32) - mean) * inv_std
    # Rounded once in every kernel, so that all of them see the same sign.
    v = tl.fma(gamma, xh, beta)
    return xh, v, tl.where(v > 0, 1.0, negative_slope)
