"""Stages of unequal speed that do not wait for each other, at a cost in accuracy.

A stage holds the latest N inputs that have come from the stage before. Where a new one has come it
trains on that; where none has, it trains once more on one that it holds, the least used. Where they
come faster than it trains, those in between are never used. So every stage is busy all the time,
the epoch lasts as long as the first stage's does, and no run is repeated exactly.

Source: Belilovsky, Eickenberg and Oyallon, "Decoupled Greedy Learning of CNNs" (ICML 2020),
algorithm 2; arXiv 1901.08164.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locallearn.data.loader import EpochLoader
from locallearn.distributed.links import Inbox, Outbox, Waiting
from locallearn.distributed.receiving import AroundLoader


@dataclass
class _Held:
    """An input: which batch of the epoch it was made of, and how often it was trained on."""

    tensor: Tensor
    batch: int
    num_uses: int = 0


class ReplayBuffer:
    """The latest inputs of a stage, written by one thread and read by another.

    Arguments:
        size: N, how many are held.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[_Held] = []  # the newest last
        self._changed = threading.Condition()
        self._has_ended = False
        self._error: BaseException | None = None
        self.num_taken = 0

    def add(self, tensor: Tensor, batch: int) -> None:
        with self._changed:
            self._held.append(_Held(tensor, batch))
            del self._held[: -self._size]
            self._changed.notify()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; ``error`` says why, where that is no good end."""
        with self._changed:
            self._has_ended, self._error = True, error
            self._changed.notify()

    def take(self) -> tuple[Tensor, int] | None:
        """The least used input, of several such the newest, and which batch it was made of; waits
        for the first. None at the end, once one has been taken.

        Raises:
            whatever :meth:`end` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._has_ended)
            if self._error is not None:
                raise self._error
            if not self._held or (self._has_ended and self.num_taken):
                return None
            chosen = min(reversed(self._held), key=lambda held: held.num_uses)
            self.num_taken += 1
            chosen.num_uses += 1
            return chosen.tensor, chosen.batch


class ReplaySource(AroundLoader[Any]):
    """A loader of the first stage, that says which batch it is at.

    Arguments:
        loader: of its batches.
        outbox: to the next stage.
    """

    def __init__(self, loader: EpochLoader[Any], outbox: Outbox) -> None:
        super().__init__(loader)
        self._outbox = outbox

    def crops(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
        for batch, (crops, labels) in enumerate(self._loader.crops(epoch, start), start=start):
            self._outbox.batch = batch
            yield crops, labels
        self._outbox.flag = 0
        self._outbox.end()

    def images(self, crops: Any) -> Tensor:
        return self._loader.images(crops)


class ReplayLoader(AroundLoader[Tensor]):
    """The inputs of a later stage, as many as it has the time for.

    Arguments:
        loader: of the batches that go into the first stage.
        inbox: from the stage before.
        outbox: to the next stage; None of the last.
        size: N.
        waiting: around the waiting for the stage before.

    Attributes:
        flag: a signal for which all are to stop now, or 0.
    """

    def __init__(
        self,
        loader: EpochLoader[Any],
        inbox: Inbox,
        outbox: Outbox | None,
        *,
        size: int,
        waiting: Waiting,
    ) -> None:
        super().__init__(loader)
        self.flag = 0
        self._inbox = inbox
        self._outbox = outbox
        self._size = size
        self._waiting = waiting

    def crops(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        labels = list(self.batch_labels(epoch))
        buffer = ReplayBuffer(self._size)
        thread = threading.Thread(target=self._receive, args=(buffer,), daemon=True)
        thread.start()
        while (taken := self._take(buffer)) is not None:
            tensor, batch = taken
            if self._outbox is not None:
                self._outbox.batch = batch
            yield tensor, labels[batch]
        thread.join()
        self.flag = self._inbox.flag
        if self._outbox is not None:
            self._outbox.flag = self.flag
            self._outbox.end()

    def images(self, crops: Tensor) -> Tensor:
        return crops

    def _take(self, buffer: ReplayBuffer) -> tuple[Tensor, int] | None:
        with self._waiting(
            self._inbox.sender
        ):  # for the first; and an exchange's failure is raised here
            return buffer.take()

    def _receive(self, buffer: ReplayBuffer) -> None:
        try:
            while (tensor := self._inbox.take(is_watched=False)) is not None:
                buffer.add(tensor, self._inbox.batch)
        except BaseException as error:  # the main thread's to raise
            buffer.end(error)
        else:
            buffer.end()
