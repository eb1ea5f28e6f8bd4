"""Batches of features: what a frozen front of a network made of the images, kept on disk.

Shapes: V views, M images, B images of a batch, ... of one image's features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from locallearn.data.loader import EpochLoader, batch_ends, epoch_generator, epoch_order

FEATURE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# NumPy has no bfloat16: its bits are kept as integers.
STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bf16": np.dtype(np.int16),
}


class FeatureRows(NamedTuple):
    """Which features make a batch: view and image, (B,), int64 each, on the CPU."""

    views: Tensor
    images: Tensor


class FeatureLoader(EpochLoader[FeatureRows]):
    """Epochs of (features, labels) batches, in the order that an `ImageLoader` has.

    Arguments:
        features: (V, M, ...), as :data:`STORED_DTYPES` has them; a memory map.
        labels: (M,), int64.
        kept_as: name of the dtype that they are kept in.
        dtype: of the batches.
        batch_size: B.
        device: where the batches go.
        shuffle: a new order each epoch, or the source's own.
        seed: of order and views.
        balance: with ``shuffle``, an epoch shows every class equally often.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: Tensor,
        *,
        kept_as: str,
        dtype: torch.dtype,
        batch_size: int,
        device: torch.device,
        shuffle: bool = False,
        seed: int = 0,
        balance: bool = False,
    ) -> None:
        assert features.shape[1] == len(labels)
        super().__init__(batch_ends(len(labels), batch_size, shuffle=shuffle))
        self.features = features
        self.labels = labels.to(device)
        self.device = device
        self.shuffle = shuffle
        self.seed = seed
        self.balance = balance
        self._kept_as = kept_as
        self._dtype = dtype

    def labels_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[Tensor]:
        for _, labels in self.crops_of(parts, epoch):  # which reads no feature
            yield labels

    def crops_of(
        self, parts: Sequence[slice], epoch: int = 0
    ) -> Iterator[tuple[FeatureRows, Tensor]]:
        """Which rows make these parts of an epoch."""
        generator = epoch_generator(self.seed, epoch)
        order = epoch_order(self.labels, generator, shuffle=self.shuffle, balance=self.balance)
        views = torch.randint(len(self.features), (len(order),), generator=generator)
        for part in parts:
            index = order[part]
            yield FeatureRows(views[part], index), self.labels[index.to(self.device)]

    def images(self, crops: FeatureRows) -> Tensor:
        """A batch's features, (B, ...)."""
        read = torch.from_numpy(np.array(self.features[crops.views.numpy(), crops.images.numpy()]))
        return read.view(FEATURE_DTYPES[self._kept_as]).to(self.device, self._dtype)

    def no_images(self) -> Tensor:
        """(0, ...)."""
        return torch.empty((0, *self.features.shape[2:]), dtype=self._dtype, device=self.device)
