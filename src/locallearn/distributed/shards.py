"""Each replica's part of every batch, or of the batches.

Shapes: N images of a batch, n of a replica's part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic

import torch
from torch import Tensor

from locallearn.data.loader import Chosen, EpochLoader
from locallearn.errors import UserError


class PartialLoader(EpochLoader[Chosen | None], Generic[Chosen]):
    """Some parts of a loader's epochs; no image that lies in none of them is read.

    Arguments:
        loader: of the whole.
        parts: of the loader's epoch; what comes of an empty one is None, with no labels.
    """

    def __init__(self, loader: EpochLoader[Chosen], parts: list[slice]) -> None:
        super().__init__([part.stop for part in parts])
        self.device = loader.device
        self._loader = loader
        self._parts = parts

    @property
    def num_images(self) -> int:
        return sum(part.stop - part.start for part in self._parts)

    @property
    def batches(self) -> list[slice]:
        return self._parts

    def crops_of(
        self, parts: Sequence[slice], epoch: int = 0
    ) -> Iterator[tuple[Chosen | None, Tensor]]:
        chosen = self._loader.crops_of(_with_images(parts), epoch)
        for part in parts:
            yield next(chosen) if part.stop > part.start else (None, self._no_labels())

    def labels_of(self, parts: Sequence[slice], epoch: int = 0) -> Iterator[Tensor]:
        labels = self._loader.labels_of(_with_images(parts), epoch)
        for part in parts:
            yield next(labels) if part.stop > part.start else self._no_labels()

    def images(self, crops: Chosen | None) -> Tensor:
        return self.no_images() if crops is None else self._loader.images(crops)

    def no_images(self) -> Tensor:
        return self._loader.no_images()

    def _no_labels(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.device)


def _with_images(parts: Sequence[slice]) -> list[slice]:
    return [part for part in parts if part.stop > part.start]


class ShardedLoader(PartialLoader[Chosen]):
    """The batches that one process would have, of which each replica sees a contiguous part.

    Order, augmentation and labels are those of the loader. The parts of a batch are as even as
    they can be, the larger ones first. Of a last batch with fewer images than replicas some get
    none.

    Arguments:
        loader: of whole batches.
        index: of this replica, from 0.
        num: of replicas.

    Raises:
        UserError: batches of fewer images than there are replicas.
    """

    def __init__(self, loader: EpochLoader[Chosen], index: int, num: int) -> None:
        assert 0 <= index < num
        first = loader.batches[0]
        if first.stop - first.start < num:
            raise UserError(
                f"a batch of {first.stop - first.start} cannot be shared by {num} replicas, each "
                f"of which needs at least one image. Give a larger --batch-size, or start fewer "
                f"processes."
            )
        super().__init__(loader, [shard(batch, index, num) for batch in loader.batches])


class DealtLoader(PartialLoader[Chosen]):
    """Every ``num``-th batch of a loader, from batch ``index`` on."""

    def __init__(self, loader: EpochLoader[Chosen], index: int, num: int) -> None:
        super().__init__(loader, loader.batches[index::num])


def shard(batch: slice, index: int, num: int) -> slice:
    """The part of a batch that is the replica's ``index`` of ``num``."""
    each, more = divmod(batch.stop - batch.start, num)
    begin = batch.start + index * each + min(index, more)
    return slice(begin, begin + each + (index < more))
