"""Each replica's part of every batch.

Shapes: N images of a batch, n of a replica's part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic

import torch
from torch import Tensor

from locallearn.data.loader import Chosen, EpochLoader
from locallearn.errors import UserError


class ShardedLoader(EpochLoader[Chosen | None], Generic[Chosen]):
    """The batches that one process would have, of which each replica sees a contiguous part.

    Order, augmentation and labels are those of the loader. The parts of a batch are as even as
    they can be, the larger ones first. Of a last batch with fewer images than replicas some get
    none: their part is an empty one.

    Arguments:
        loader: of whole batches; no image of the others' parts is read.
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
        self._parts = [shard(batch, index, num) for batch in loader.batches]
        super().__init__([batch.stop for batch in loader.batches])
        self.loader = loader
        self.device = loader.device

    @property
    def num_images(self) -> int:
        """Images of this replica, an epoch."""
        return sum(part.stop - part.start for part in self._parts)

    @property
    def batches(self) -> list[slice]:
        """Where in the epoch the parts of this replica lie."""
        return self._parts

    def crops_of(
        self, parts: Sequence[slice], epoch: int = 0
    ) -> Iterator[tuple[Chosen | None, Tensor]]:
        """As the loader's; None, and no labels, of an empty part."""
        chosen = self.loader.crops_of([part for part in parts if part.stop > part.start], epoch)
        for part in parts:
            if part.stop > part.start:
                yield next(chosen)
            else:
                yield None, torch.empty(0, dtype=torch.int64, device=self.device)

    def images(self, crops: Chosen | None) -> Tensor:
        return self.no_images() if crops is None else self.loader.images(crops)

    def no_images(self) -> Tensor:
        return self.loader.no_images()


def shard(batch: slice, index: int, num: int) -> slice:
    """The part of a batch that is the replica's ``index`` of ``num``."""
    each, more = divmod(batch.stop - batch.start, num)
    begin = batch.start + index * each + min(index, more)
    return slice(begin, begin + each + (index < more))
