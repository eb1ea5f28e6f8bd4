"""`augment`; see `kernels.interface`.

Shapes: P pixels of all images, C channels, B images of a batch, H W height and width of a crop.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, check_image_dtype, power_of_two
from locallearn.kernels.interface import Crops
from locallearn.kernels.triton.common import OPTIONS, tile_for


def augment(
    crops: Crops,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    check_image_dtype("triton", dtype)
    batch_size, num_channels = len(crops.top), crops.pixels.shape[1]
    height, width = size
    shape = (batch_size, num_channels, height, width)
    images = torch.empty(shape, dtype=dtype, device=mean.device, memory_format=torch.channels_last)
    tile = tile_for(height * width, num_channels)
    _augment_kernel[(batch_size, ceil_div(height * width, tile.rows))](
        *(t.contiguous() for t in crops),
        mean.contiguous(),
        std.contiguous(),
        images,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=num_channels,
        BLOCK_P=tile.rows,
        BLOCK_C=power_of_two(num_channels),
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    return images


@triton.jit
def _augment_kernel(
    pixels_ptr,
    offsets_ptr,
    heights_ptr,
    widths_ptr,
    top_ptr,
    left_ptr,
    flip_ptr,
    box_ptr,
    mean_ptr,
    std_ptr,
    images_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_position = position < HEIGHT * WIDTH
    row = position // WIDTH
    column = position % WIDTH
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS

    mirrored = tl.where(tl.load(flip_ptr + image) != 0, WIDTH - 1 - column, column)
    y = tl.load(top_ptr + image) + row
    x = tl.load(left_ptr + image) + mirrored
    image_height = tl.load(heights_ptr + image)
    image_width = tl.load(widths_ptr + image)
    is_inside = (y >= 0) & (y < image_height) & (x >= 0) & (x < image_width) & is_position
    place = (tl.load(offsets_ptr + image) + y * image_width + x) * CHANNELS
    # Outside the image is padding, which is black.
    pixel = tl.load(
        pixels_ptr + place[:, None] + channel[None, :],
        mask=is_inside[:, None] & is_channel[None, :],
        other=0,
    ).to(tl.float32)

    mean = tl.load(mean_ptr + channel, mask=is_channel, other=0.0)
    std = tl.load(std_ptr + channel, mask=is_channel, other=1.0)
    value = pixel * (1.0 / (255.0 * std))[None, :] - (mean / std)[None, :]
    box = box_ptr + image * 4
    box_top = tl.load(box)
    box_left = tl.load(box + 1)
    is_erased = (row >= box_top) & (row < box_top + tl.load(box + 2))
    is_erased = is_erased & (column >= box_left) & (column < box_left + tl.load(box + 3))
    value = tl.where(is_erased[:, None], 0.0, value)

    out = (image * (HEIGHT * WIDTH) + position) * CHANNELS
    mask = is_position[:, None] & is_channel[None, :]
    tl.store(images_ptr + out[:, None] + channel[None, :], value, mask=mask)
