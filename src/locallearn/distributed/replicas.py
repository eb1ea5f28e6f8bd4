"""Data in parallel: replicas of the same blocks, each of which trains on a part of every batch.

What a block's gradients are is summed over the replicas while the next blocks run; see
`engine.reduction`, which has the arithmetic.

Shapes: D replicas, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.data.loader import Chosen, EpochLoader
from locallearn.distributed.processes import Processes
from locallearn.distributed.shards import DealtLoader, ShardedLoader
from locallearn.engine.evaluation import Evaluation, evaluation_of
from locallearn.engine.learner import LocalLearner

Waiting = Callable[[], contextlib.AbstractContextManager[None]]
"""Around the waiting for the other replicas."""


class Replica:
    """This process among those that train the same blocks.

    All of them call the same methods in the same order.

    Arguments:
        processes: all that have joined.
        synchronize_batch_norm: normalise by whole batches; see `engine.batch_norm`.
    """

    def __init__(self, processes: Processes, *, synchronize_batch_norm: bool = False) -> None:
        self.index = processes.replica
        self.num = processes.parallelism.num_replicas
        self.synchronize_batch_norm = synchronize_batch_norm
        self._group = processes.replicas
        self._pulse = processes.pulse
        # Whom it waits for: the other one, or all of several.
        stage, other = processes.stage, 1 - processes.replica
        self._others = processes.rank_of(stage, other) if self.num == 2 else None
        self._learner: LocalLearner | None = None
        # The last question for a stop, and who answers it.
        self._asked: tuple[Tensor, dist.Work] | None = None

    def attach(self, learner: LocalLearner) -> None:
        """Have a learner's gradients summed over the replicas.

        Arguments:
            learner: with the same weights in all of them.

        Raises:
            UserError: settings that synchronized BatchNorm does not go with.
        """
        learner.share_batches(self, synchronize_batch_norm=self.synchronize_batch_norm)
        self._learner = learner

    def loader(self, loader: EpochLoader[Chosen]) -> ShardedLoader[Chosen]:
        """This replica's part of each of its batches.

        Raises:
            UserError: batches of fewer images than there are replicas.
        """
        return ShardedLoader(loader, self.index, self.num)

    def dealt(self, loader: EpochLoader[Chosen]) -> DealtLoader[Chosen]:
        """Those of its batches that this replica evaluates, one in D."""
        return DealtLoader(loader, self.index, self.num)

    # -- what the engine asks for ---------------------------------------------------------------

    def begin(self, bucket: Tensor) -> _Sum:
        """Begin to replace what is in ``bucket`` by its sum over the replicas."""
        with self._waiting():  # it fails where another is lost
            return _Sum(dist.all_reduce(bucket, group=self._group, async_op=True), self._waiting)

    def gather(self, tensor: Tensor) -> Tensor:
        """Every replica's, stacked in their order: (D, ...)."""
        sent = tensor.contiguous()
        if sent.dtype == torch.bool:  # which is nothing that can be sent
            return self.gather(sent.to(torch.uint8)).bool()
        received = [torch.empty_like(sent) for _ in range(self.num)]
        with self._waiting():
            dist.all_gather(received, sent, group=self._group)
        return torch.stack(received)

    # -- what the training loop asks for --------------------------------------------------------

    def synchronize_buffers(self) -> None:
        """Have running statistics agree, before an evaluation or a checkpoint."""
        assert self._learner is not None, "no learner is attached"
        self._learner.synchronize_buffers()

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the replicas; on the host or the device, the same bits in all of them."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._waiting():
            dist.all_reduce(total, group=self._group)
        return total

    def evaluation(self, confusion: Tensor, loss: Tensor) -> Evaluation:
        """Of all replicas' tallies, from this one's; see `engine.evaluation.tally`."""
        return evaluation_of(self.sum(confusion), self.sum(loss))

    def agree_to_stop(self, signal: int | None) -> int | None:
        """Asked once a step: whether to stop, and by which signal, the same in all replicas.

        The answer is to what was asked a step before, which has travelled meanwhile.

        Arguments:
            signal: that this process has received; None where none.
        """
        answer = 0
        if self._asked is not None:
            asked, work = self._asked
            with self._waiting():
                work.wait()
            answer = int(asked)
        asked = torch.tensor(signal or 0)
        with self._waiting():
            work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._asked = (asked, work)
        return answer or None

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._pulse.waiting(self._others)


class _Sum:
    """A sum that is being made; see `engine.reduction.Pending`."""

    def __init__(self, work: dist.Work | None, waiting: Waiting) -> None:
        assert work is not None, "this process is no member of the group"
        self._work = work
        self._waiting = waiting

    def is_done(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        with self._waiting():
            self._work.wait()
