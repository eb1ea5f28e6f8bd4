"""Where images come from: uint8 pixels in memory, or files decoded on the way.

Shapes: M images, P pixels of all of them, B images of a batch, H W crop height and width,
C channels.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
            yield _crops_of(crops.to(device, non_blocking=True), draw)

    def fingerprint(self) -> str:
        crc = zlib.crc32(self.labels.cpu().numpy().data)
        for path in self.paths:
            crc = zlib.crc32(os.fsencode(f"{path.name} {path.stat().st_size}\n"), crc)
        return f"{crc:08x}"


# Batches that are gathered ahead of the one in use.
_BATCHES_AHEAD = 2


@dataclass
class MappedImages:
    """Images too many for memory, decoded once: gathered from a memory-mapped file.

    Arguments:
        files: what they were decoded from.
        path: the mapped file.
        pixels: (P, C), uint8, mapped; of all images of the file, one after the other.
        offsets: (M,), int64, on the CPU: where each image begins in ``pixels``.
        heights, widths: (M,), int64, on the CPU.
        labels: (M,), int64.
    """

    files: FileImages
    path: Path
    pixels: np.ndarray
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> MappedImages:
        files = self.files.subset(indices)
        parts = (t[indices] for t in (self.offsets, self.heights, self.widths, self.labels))
        return MappedImages(files, self.path, self.pixels, *parts)

    def to(self, device: torch.device) -> MappedImages:
        return replace(self, labels=self.labels.to(device))

    def read(self) -> MemoryImages:
        """All of it, in memory. Read as a file: that is three times as fast as through the map."""
        ends = self.offsets + self.heights * self.widths
        spans = list(zip(self.offsets.tolist(), ends.tolist(), strict=True))
        channels = self.files.num_channels
        pixels = np.empty((sum(b - a for a, b in spans), channels), np.uint8)
        place = 0
        with open(self.path, "rb") as file:
            for a, b in _joined(spans):
                file.seek(a * channels)
                if file.readinto(pixels[place : place + b - a].data) != (b - a) * channels:
                    raise UserError(f"{self.path} was cut off meanwhile. Delete its directory.")
                place += b - a
        return MemoryImages(torch.from_numpy(pixels), self.heights, self.widths, self.labels)

    def batches(
        self,
        indices: Sequence[Tensor],
        draws: Sequence[Draws],
        size: tuple[int, int],
        recipe: Augmentation,
    ) -> Iterator[Crops]:
        device = self.labels.device
        places = [
            (index.cpu(), draw.place.cpu()) for index, draw in zip(indices, draws, strict=True)
        ]
        # One thread suffices: it waits for the disk, and copies without Python's lock.
        with ThreadPoolExecutor(1, "gather") as pool:
            ahead: deque[Future[Tensor]] = deque()
            for number, draw in enumerate(draws):
                for index, place in places[number + len(ahead) : number + 1 + _BATCHES_AHEAD]:
                    ahead.append(pool.submit(self._gather, index, place, size, recipe))
                yield _crops_of(ahead.popleft().result().to(device, non_blocking=True), draw)

    def _gather(
        self, index: Tensor, place: Tensor, size: tuple[int, int], recipe: Augmentation
    ) -> Tensor:
        """The crops of a batch, uint8 (B, H, W, C), on the CPU; black where there is no image."""
        heights, widths = self.heights[index], self.widths[index]
        top, left = crop_corner(heights, widths, size, place, recipe)
        channels = self.files.num_channels
        crops = torch.zeros(
            (len(index), *size, channels),
            dtype=torch.uint8,
            pin_memory=self.labels.device.type == "cuda",
        )
        array = crops.numpy()
        numbers = torch.stack([self.offsets[index], heights, widths, top, left], dim=1).tolist()
        for crop, (offset, h, w, y, x) in zip(array, numbers, strict=True):
            image = self.pixels[offset : offset + h * w].reshape(h, w, channels)
            y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + size[0], h), min(x + size[1], w)
            crop[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
        return crops

    def fingerprint(self) -> str:
        return self.files.fingerprint()


def _joined(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same ranges, those that follow one another made one."""
    begin, end = 0, 0
    for a, b in spans:
        if a != end:
            yield begin, end
            begin = a
        end = b
    yield begin, end


def _crops_of(batch: Tensor, draw: Draws) -> Crops:
    """Crops that were cut already, uint8 (B, H, W, C), as the op `augment` takes them."""
    num, height, width, _ = batch.shape
    area = height * width
    offsets = torch.arange(0, num * area, area, device=batch.device)
    corner = torch.zeros_like(offsets)
    return Crops(
        batch.flatten(0, 2),
        offsets,
        torch.full_like(offsets, height),
        torch.full_like(offsets, width),
        corner,
        corner,
        draw.flip,
        draw.box,
    )


def decode_all(source: FileImages, tell: Callable[[int], None] | None = None) -> MemoryImages:
    """All images of a source in memory; ``tell`` as :func:`read_all` has it.

    Raises:
        UserError: names the unreadable ones.
    """
    decode = try_read(read_image, source.num_channels, source.resize)
    images: list[np.ndarray] = read_all(source.paths, decode, tell)
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
