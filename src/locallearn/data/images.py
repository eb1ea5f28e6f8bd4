"""Where images come from: uint8 pixels in memory, or files decoded on the way.

Shapes: M images, P pixels of all of them, B images of a batch, H W crop height and width,
C channels.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from locallearn.data.augment import Augmentation, Draws, crop_corner
from locallearn.data.reading import num_workers_for, read_all, read_image, try_read, worker_settings
from locallearn.errors import UserError
from locallearn.kernels import Crops


@dataclass(frozen=True)
class InputSpec:
    """What the network sees of an image.

    Arguments:
        image_size: (H, W) of the crop, pixels.
        num_channels: C.
        resize: what the shorter side is scaled to before the crop, pixels; None if it is not.
        mean, std: for each channel, of pixel values in [0, 1]; empty where still to be measured.
    """

    image_size: tuple[int, int]
    num_channels: int
    resize: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class ImageSource(Protocol):
    """A labelled set of images.

    labels: (M,), int64, on the CPU or the training device.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> ImageSource:
        """The images at ``indices``, in that order."""
        ...

    def to(self, device: torch.device) -> ImageSource:
        """The same source, its resident tensors on ``device``."""
        ...

    def batches(
        self,
        indices: Sequence[Tensor],
        draws: Sequence[Draws],
        size: tuple[int, int],
        recipe: Augmentation,
    ) -> Iterator[Crops]:
        """For each index batch which pixels make it, for the op `augment`."""
        ...

    def fingerprint(self) -> str:
        """Eight hex digits that differ when images or labels differ."""
        ...


@dataclass
class MemoryImages:
    """Decoded images of any sizes, all in one tensor.

    A batch is one gather (the op `augment`): every output pixel's place in ``pixels`` follows from
    its image's offset and width, so choosing images, cropping, padding, mirroring, normalising and
    erasing cost one pass together.

    Arguments:
        pixels: (P, C), uint8, the images' rows one after the other.
        heights, widths: (M,), int64.
        labels: (M,), int64.
    """

    pixels: Tensor
    heights: Tensor
    widths: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        areas = self.heights * self.widths
        self.offsets = torch.cumsum(areas, 0) - areas
        assert int(areas.sum()) == len(self.pixels), "sizes and pixels disagree"

    @classmethod
    def from_array(cls, images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> MemoryImages:
        """Equal-sized images, (M, H, W) or (M, H, W, C) uint8."""
        array = torch.as_tensor(images)
        assert array.dtype == torch.uint8
        num, height, width = array.shape[:3]
        channels = 1 if array.ndim == 3 else array.shape[3]
        return cls(
            array.reshape(-1, channels).contiguous(),
            torch.full((num,), height),
            torch.full((num,), width),
            torch.as_tensor(labels, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> MemoryImages:
        heights, widths, starts = (t[indices] for t in (self.heights, self.widths, self.offsets))
        ends = starts + heights * widths
        parts = [self.pixels[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        pixels = torch.cat(parts) if parts else self.pixels[:0]
        return MemoryImages(pixels, heights, widths, self.labels[indices])

    def to(self, device: torch.device) -> MemoryImages:
        moved = (self.pixels, self.heights, self.widths, self.labels)
        return MemoryImages(*(t.to(device) for t in moved))

    def batches(
        self,
        indices: Sequence[Tensor],
        draws: Sequence[Draws],
        size: tuple[int, int],
        recipe: Augmentation,
    ) -> Iterator[Crops]:
        for index, draw in zip(indices, draws, strict=True):
            heights, widths = self.heights[index], self.widths[index]
            top, left = crop_corner(heights, widths, size, draw.place, recipe)
            offsets = self.offsets[index]
            yield Crops(self.pixels, offsets, heights, widths, top, left, draw.flip, draw.box)

    def fingerprint(self) -> str:
        crc = zlib.crc32(self.pixels.cpu().numpy().data)
        for t in (self.heights, self.widths, self.labels):
            crc = zlib.crc32(t.cpu().numpy().data, crc)
        return f"{crc:08x}"


@dataclass
class FileImages:
    """Images too many for memory: decoded by worker processes, batch by batch.

    Arguments:
        paths: M files.
        labels: (M,), int64.
        num_channels: C, 1 or 3.
        resize: the shorter side is scaled to this, pixels; None keeps the size.
        num_workers: reader processes; chosen by itself where None.
    """

    paths: Sequence[Path]
    labels: Tensor
    num_channels: int
    resize: int | None
    num_workers: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> FileImages:
        paths = [self.paths[i] for i in indices.tolist()]
        return replace(self, paths=paths, labels=self.labels[indices])

    def to(self, device: torch.device) -> FileImages:
        return replace(self, labels=self.labels.to(device))

    def batches(
        self,
        indices: Sequence[Tensor],
        draws: Sequence[Draws],
        size: tuple[int, int],
        recipe: Augmentation,
    ) -> Iterator[Crops]:
        device = self.labels.device
        height, width = size
        items = [
            list(zip(index.tolist(), draw.place.tolist(), strict=True))
            for index, draw in zip(indices, draws, strict=True)
        ]
        workers = self.num_workers
        loader: DataLoader[Tensor | str] = DataLoader(
            _Crops(self, size, recipe),
            batch_sampler=items,
            collate_fn=_stack,
            num_workers=num_workers_for(len(self)) if workers is None else workers,
            pin_memory=device.type == "cuda",
            **worker_settings(),
        )
        for crops, draw in zip(loader, draws, strict=True):
            if isinstance(crops, str):
                raise UserError(f"unreadable image {crops}. Remove or replace it.")
            batch = crops.to(device, non_blocking=True)
            offsets = torch.arange(0, len(batch) * height * width, height * width, device=device)
            corner = torch.zeros_like(offsets)
            yield Crops(
                batch.flatten(0, 2),
                offsets,
                torch.full_like(offsets, height),
                torch.full_like(offsets, width),
                corner,
                corner,
                draw.flip,
                draw.box,
            )

    def fingerprint(self) -> str:
        crc = zlib.crc32(self.labels.cpu().numpy().data)
        for path in self.paths:
            crc = zlib.crc32(os.fsencode(f"{path.name} {path.stat().st_size}\n"), crc)
        return f"{crc:08x}"


def decode_all(source: FileImages) -> MemoryImages:
    """All images of a source in memory. Raises UserError that names the unreadable ones."""
    decode = try_read(read_image, source.num_channels, source.resize)
    images: list[np.ndarray] = read_all(source.paths, decode)
    heights = torch.tensor([image.shape[0] for image in images])
    widths = torch.tensor([image.shape[1] for image in images])
    pixels = np.concatenate([image.reshape(-1, source.num_channels) for image in images])
    return MemoryImages(torch.from_numpy(pixels), heights, widths, source.labels)


class _Crops(torch.utils.data.Dataset[Tensor | str]):
    """Map from (image number, place) to its crop, uint8 (H, W, C), or to its path if unreadable."""

    def __init__(self, source: FileImages, size: tuple[int, int], recipe: Augmentation) -> None:
        self.paths = source.paths
        self.read = try_read(read_image, source.num_channels, source.resize)
        self.size = size
        self.recipe = recipe

    def __getitem__(self, item: tuple[int, list[float]]) -> Tensor | str:
        number, place = item
        array = self.read(self.paths[number])
        if array is None:
            return str(self.paths[number])
        image = torch.from_numpy(array)
        (height, width), pad = image.shape[:2], self.recipe.pad
        top, left = crop_corner(
            torch.tensor([height]),
            torch.tensor([width]),
            self.size,
            torch.tensor([place]),
            self.recipe,
        )
        if pad:
            image = torch.nn.functional.pad(image, (0, 0, pad, pad, pad, pad))
        y, x = int(top) + pad, int(left) + pad
        return image[y : y + self.size[0], x : x + self.size[1]].contiguous()


def _stack(crops: list[Tensor | str]) -> Tensor | str:
    """A batch, or the first path that could not be read."""
    for crop in crops:
        if isinstance(crop, str):
            return crop
    return torch.stack([crop for crop in crops if isinstance(crop, Tensor)])
