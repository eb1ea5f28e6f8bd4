"""Augmentation of whole batches, with independent randomness for each image.

Shapes: N images of an epoch, B of a batch, H W height and width, C channels.

All of an epoch's random numbers are drawn at its start, from a generator seeded by (seed, epoch),
and travel to the device once. So a batch needs no draw, a run that resumes in the middle of an
epoch sees what it would have seen, and the result does not depend on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

AUGMENTATIONS = ("none", "basic", "standard")

# torchvision's RandomErasing (Zhong et al., arXiv 1708.04896), which the authors use.
_ERASE_AREA = (0.02, 0.33)
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(3.3))
_ERASE_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """A recipe, applied in this order: crop, flip, (normalise,) erase.

    Arguments:
        pad: black pixels added on every side before the crop.
        random_crop: crop at a random place; the centre otherwise.
        flip: mirror left to right with probability 1/2.
        erase_probability: chance that a random rectangle (2 to 33 % of the area) is set to the
            mean colour.
    """

    pad: int = 0
    random_crop: bool = False
    flip: bool = False
    erase_probability: float = 0.0

    def describe(self) -> str:
        """One phrase for people."""
        parts = []
        if self.random_crop:
            parts.append(f"random crop (pad {self.pad})" if self.pad else "random crop")
        if self.flip:
            parts.append("flip")
        if self.erase_probability:
            parts.append(f"erase p={self.erase_probability:g}")
        return ", ".join(parts) or "none"


NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class Draws:
    """The random numbers of an epoch (or, sliced, of a batch).

    place: (N, 2), float32 in [0, 1), where in its range the crop lies; flip: (N,), bool;
    box: (N, 4), int32, erased rectangle (top, left, height, width), pixels, zero for none.
    """

    place: Tensor
    flip: Tensor
    box: Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.place[part], self.flip[part], self.box[part])

    def to(self, device: torch.device) -> Draws:
        return Draws(*(t.to(device) for t in (self.place, self.flip, self.box)))


def draw_epoch(
    augmentation: Augmentation, num: int, size: tuple[int, int], generator: torch.Generator
) -> Draws:
    """Random numbers for ``num`` images cropped to ``size`` (H, W), on the CPU."""
    place = torch.rand(num, 2, generator=generator)
    flip = torch.rand(num, generator=generator) < 0.5
    box = torch.zeros(num, 4, dtype=torch.int32)
    if augmentation.erase_probability:
        box = _draw_boxes(num, size, generator)
        erased = torch.rand(num, generator=generator) < augmentation.erase_probability
        box *= erased[:, None]
    return Draws(place, flip & augmentation.flip, box)


def _draw_boxes(num: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(num, 4): for each image the first of ten candidate rectangles that fits inside."""
    height, width = size
    u = torch.rand(4, num, _ERASE_TRIES, generator=generator)
    area = height * width * (_ERASE_AREA[0] + u[0] * (_ERASE_AREA[1] - _ERASE_AREA[0]))
    low, high = _ERASE_LOG_ASPECT
    aspect = torch.exp(low + u[1] * (high - low))
    h = torch.round(torch.sqrt(area * aspect))
    w = torch.round(torch.sqrt(area / aspect))
    fits = (h < height) & (w < width) & (h > 0) & (w > 0)
    top = torch.floor(u[2] * (height - h + 1))
    left = torch.floor(u[3] * (width - w + 1))
    first = fits.int().argmax(dim=1, keepdim=True)
    box = torch.stack([t.gather(1, first)[:, 0] for t in (top, left, h, w)], dim=1).int()
    box *= fits.any(dim=1, keepdim=True)
    return box


def crop_corner(
    heights: Tensor, widths: Tensor, size: tuple[int, int], place: Tensor, recipe: Augmentation
) -> tuple[Tensor, Tensor]:
    """Top and left of each image's crop in its own pixels; negative inside the padding.

    Arguments:
        heights, widths: (B,), int64, of the images as stored.
        size: (H, W) of the crop.
        place: (B, 2) in [0, 1).

    Returns:
        top and left, (B,), int64.
    """
    corner = []
    for axis, (extent, crop) in enumerate(((heights, size[0]), (widths, size[1]))):
        if recipe.random_crop:
            choices = (extent + 2 * recipe.pad - crop + 1).clamp_min(1)
            start = torch.minimum((place[:, axis] * choices).long(), choices - 1) - recipe.pad
        else:
            # torchvision's CenterCrop rounds half to even.
            start = torch.round((extent - crop) / 2).long()
        corner.append(start)
    return corner[0], corner[1]
