"""Batches of an image source, on the training device, augmented there.

Shapes: B images of a batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from locallearn.data.augment import NO_AUGMENTATION, Augmentation, draw_epoch
from locallearn.data.images import FileImages, ImageSource, InputSpec, MemoryImages, decode_all
from locallearn.data.reading import (
    ImageHeader,
    read_all,
    read_header,
    resized,
    some,
    try_read,
)
from locallearn.errors import UserError
from locallearn.kernels import Crops, load_kernels

Chosen = TypeVar("Chosen")
"""What tells which of a source make a batch."""


class EpochLoader(Generic[Chosen]):
    """What loaders share: epochs of batches, of which first is chosen what is in them.

    Subclasses write :meth:`crops_of`, :meth:`labels_of`, :meth:`images` and :meth:`no_images`.

    Arguments:
        ends: where the batches of an epoch end.

    Attributes:
        device: where the batches are made.
    """

    device: torch.device

    def __init__(self, ends: list[int]) -> None:
        self._ends = ends

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._ends)

    @property
    def num_images(self) -> int:
        """Images an epoch."""
        return self._ends[-1]

    @property
    def batches(self) -> list[slice]:
        """Where in its epoch each batch lies."""
        return [slice(a, b) for a, b in pairwise([0, *self._ends])]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: as :meth:`images` makes them; labels (B,)."""
        for crops, labels in self.crops(epoch, start):
            yield self.images(crops), labels

    def crops(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Chosen, Tensor]]:
        """What is in the batches of an epoch, before :meth:`images` makes them.

        Arguments:
            epoch: chooses order and what else is random, from 0.
            start: first batch to yield.

        Yields:
            what :meth:`images` takes; labels, int64 (B,).

        Raises:
            UserError: an image file that can't be read.
        """
        return self.crops_of(self.batches[start:], epoch)

    def crops_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[tuple[Chosen, Tensor]]:
        """As :meth:`crops`, of other parts of the epoch than its batches, none of them empty. What
        lies in none of them is not read."""
        raise NotImplementedError

    def batch_labels(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """The labels (B,) of an epoch's batches alone; no image is looked at."""
        return self.labels_of(self.batches[start:], epoch)

    def labels_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[Tensor]:
        """As :meth:`batch_labels`, of other parts of the epoch than its batches."""
        raise NotImplementedError

    def images(self, crops: Chosen) -> Tensor:
        """A batch."""
        raise NotImplementedError

    def no_images(self) -> Tensor:
        """A batch without any, (0, ...), as :meth:`images` would make it."""
        raise NotImplementedError


class ImageLoader(EpochLoader[Crops]):
    """Epochs of (images, labels) batches.

    The order and the augmentation of an epoch follow from (seed, epoch) alone, so any epoch can
    be entered at any batch. A last batch of one image, where the others have more, is left out if
    ``shuffle`` is set: BatchNorm cannot train on it as on the others.

    Arguments:
        source: the images.
        inputs: crop size and normalisation.
        batch_size: B.
        device: where the batches are made.
        augmentation: what the images undergo; by default the centre crop alone.
        shuffle: a new order each epoch, or the source's own.
        seed: of order and augmentation.
        balance: with ``shuffle``, an epoch shows every class equally often (`balanced_order`).
        backend: whose kernel makes the batches.
    """

    def __init__(
        self,
        source: ImageSource,
        inputs: InputSpec,
        *,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation = NO_AUGMENTATION,
        shuffle: bool = False,
        seed: int = 0,
        balance: bool = False,
        backend: str = "reference",
    ) -> None:
        super().__init__(batch_ends(len(source), batch_size, shuffle=shuffle))
        if isinstance(source, MemoryImages):
            smallest = int(source.heights.min()), int(source.widths.min())
            padded = [side + 2 * augmentation.pad for side in smallest]
            assert all(a >= b for a, b in zip(padded, inputs.image_size, strict=True)), (
                f"an image of {smallest} pixels does not cover the crop {inputs.image_size}"
            )
        self.source = source.to(device)
        self.batch_size = batch_size
        self.device = device
        self.shuffle = shuffle
        self.seed = seed
        self.balance = balance
        self.backend = backend
        self._size = inputs.image_size
        self._recipe = augmentation
        self._mean = torch.tensor(inputs.mean, device=device)
        self._std = torch.tensor(inputs.std, device=device)

    def crops_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[tuple[Crops, Tensor]]:
        """Which pixels make these parts of an epoch."""
        generator = epoch_generator(self.seed, epoch)
        indices = self._indices(parts, generator)
        draws = draw_epoch(self._recipe, len(self.source), self._size, generator).to(self.device)
        batch_draws = [draws[part] for part in parts]
        crops = self.source.batches(indices, batch_draws, self._size, self._recipe)
        for index, batch in zip(indices, crops, strict=True):
            yield batch, self.source.labels[index]

    def labels_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[Tensor]:
        for index in self._indices(parts, epoch_generator(self.seed, epoch)):
            yield self.source.labels[index]

    def _indices(self, parts: Sequence[slice], generator: torch.Generator) -> list[Tensor]:
        """Which images these parts of an epoch hold."""
        labels = self.source.labels
        order = epoch_order(labels, generator, shuffle=self.shuffle, balance=self.balance)
        order = order.to(self.device)
        return [order[part] for part in parts]

    def images(self, crops: Crops) -> Tensor:
        """A batch's images, float32 (B, C, H, W) in channels-last memory."""
        kernels = load_kernels(self.backend)
        return kernels.augment(crops, self._mean, self._std, size=self._size)

    def no_images(self) -> Tensor:
        """float32 (0, C, H, W)."""
        return torch.empty((0, len(self._mean), *self._size), device=self.device)


def batch_ends(num_images: int, batch_size: int, *, shuffle: bool) -> list[int]:
    """Where the batches of an epoch end. Without a last one of a single image, where others have
    more, if ``shuffle``."""
    ends = [*range(batch_size, num_images, batch_size), num_images]
    if shuffle and batch_size > 1 and num_images > 1 and num_images % batch_size == 1:
        ends.pop()
    return ends


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The source of an epoch's random numbers."""
    generator = torch.Generator()
    # SeedSequence mixes the pair well; seed + epoch would give runs each other's epochs.
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return generator.manual_seed(int(state) & (2**63 - 1))


def epoch_order(
    labels: Tensor, generator: torch.Generator, *, shuffle: bool, balance: bool
) -> Tensor:
    """Indices of an epoch's images, (M,), int64, on the CPU.

    Arguments:
        labels: (M,), of all images.
        generator: see :func:`epoch_generator`.
        shuffle: a random order, or the source's own.
        balance: with ``shuffle``, every class equally often.
    """
    if not shuffle:
        return torch.arange(len(labels))
    if balance:
        return balanced_order(labels.cpu(), generator)
    return torch.randperm(len(labels), generator=generator)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many indices as there are images, in which every class comes equally often, up to one.

    The epoch consists of rounds, each of one image of every class in random order, so the classes
    of a batch are balanced too. A class runs through its images in random order, and again in
    another when they are used up; of a class with more images than rounds, each epoch shows others.

    Arguments:
        labels: (M,), int64, on the CPU. A class without images is passed over.
        generator: of the random numbers.

    Returns:
        (M,), int64.
    """
    num = len(labels)
    classes = torch.unique(labels)
    num_rounds = -(-num // len(classes))
    columns = []
    for label in classes.tolist():
        members = torch.nonzero(labels == label)[:, 0]
        num_passes = -(-num_rounds // len(members))
        passes = [
            members[torch.randperm(len(members), generator=generator)] for _ in range(num_passes)
        ]
        columns.append(torch.cat(passes)[:num_rounds])
    rounds = torch.stack(columns, dim=1)  # (rounds, classes)
    within = torch.rand(rounds.shape, generator=generator).argsort(dim=1)
    return rounds.gather(1, within).flatten()[:num]


def read_for_prediction(
    paths: Sequence[Path], inputs: InputSpec, batch_size: int = 128
) -> Iterator[Tensor]:
    """Image files of any size, scaled and cropped at the centre as test images are.

    Yields:
        float32 (B, C, H, W), on the CPU.

    Raises:
        UserError: names the files that are missing or can't be read; before the first batch.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no such image files: {some(missing)}.")
    headers = read_all(paths, try_read(read_header))
    for first in range(0, len(paths), batch_size):
        images = []
        part = slice(first, first + batch_size)
        for path, header in zip(paths[part], headers[part], strict=True):
            resize = inputs.resize
            if resize is None and (header.height, header.width) != inputs.image_size:
                resize = _covering_resize(header, inputs.image_size)
            label = torch.zeros(1, dtype=torch.int64)
            image = decode_all(FileImages([path], label, inputs.num_channels, resize))
            loader = ImageLoader(image, inputs, batch_size=1, device=torch.device("cpu"))
            images += [batch for batch, _ in loader.epoch()]
        yield torch.cat(images)


def _covering_resize(header: ImageHeader, size: tuple[int, int]) -> int:
    """The smallest length of the shorter side at which the image covers a crop of that size."""
    height, width = size
    scale = max(height / header.height, width / header.width)
    resize = max(1, int(scale * min(header.height, header.width)))
    while True:
        new_width, new_height = resized(header.width, header.height, resize)
        if new_width >= width and new_height >= height:
            return resize
        resize += 1
