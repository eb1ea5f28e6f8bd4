"""`augment`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.interface import Crops


def augment(
    crops: Crops,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    rows = torch.arange(size[0], device=mean.device)
    columns = torch.arange(size[1], device=mean.device)
    y = crops.top[:, None] + rows  # (B, H)
    mirrored = torch.where(crops.flip[:, None], columns.flip(0), columns)
    x = crops.left[:, None] + mirrored  # (B, W)

    heights, widths = crops.heights[:, None], crops.widths[:, None]
    y_inside = (y >= 0) & (y < heights)
    x_inside = (x >= 0) & (x < widths)
    starts = crops.offsets[:, None] + y.clamp_min(0).minimum(heights - 1) * widths
    place = starts[:, :, None] + x.clamp_min(0).minimum(widths - 1)[:, None, :]  # (B, H, W)
    pixels = crops.pixels.index_select(0, place.flatten()).view(*place.shape, -1)
    is_black = ~(y_inside[:, :, None] & x_inside[:, None, :])
    pixels = pixels.masked_fill(is_black[..., None], 0)

    images = torch.addcmul(-mean / std, pixels, 1 / (255 * std))  # (B, H, W, C)
    top, left, height, width = (column[:, None] for column in crops.box.unbind(1))
    erased_rows = (rows >= top) & (rows < top + height)
    erased_columns = (columns >= left) & (columns < left + width)
    is_erased = erased_rows[:, :, None] & erased_columns[:, None, :]
    return images.masked_fill_(is_erased[..., None], 0.0).to(dtype).permute(0, 3, 1, 2)
