"""The batches of a stage that is not the first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor

from locallearn.data.loader import Chosen, EpochLoader
from locallearn.distributed.links import Inbox


class AroundLoader(EpochLoader[Chosen]):
    """As many batches as another loader has, with its labels; what they hold is for subclasses.

    Arguments:
        loader: the other.
    """

    def __init__(self, loader: EpochLoader[Any]) -> None:
        self.device = loader.device
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def num_images(self) -> int:
        return self._loader.num_images

    def batch_labels(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return self._loader.batch_labels(epoch, start)


class ReceivingLoader(AroundLoader[Tensor]):
    """What the stage before makes of a loader's batches, with their labels, which each process
    knows by itself.

    Arguments:
        loader: of the batches that go into the first stage.
        inbox: from the stage before.
    """

    def __init__(self, loader: EpochLoader[Any], inbox: Inbox) -> None:
        super().__init__(loader)
        self._inbox = inbox

    def crops(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        labels = list(self.batch_labels(epoch, start))
        sizes = [*(len(each) for each in labels), None]
        for of_batch, (_, following) in zip(labels, pairwise(sizes), strict=True):
            tensor = self._inbox.take(following)
            assert tensor is not None
            yield tensor, of_batch

    def images(self, crops: Tensor) -> Tensor:
        return crops
