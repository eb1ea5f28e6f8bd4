"""What a training loop asks of the processes that it shares its work with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from locallearn.data.loader import EpochLoader
from locallearn.engine.building import recalibrate
from locallearn.engine.config import TrainConfig
from locallearn.engine.evaluation import Evaluation, evaluate
from locallearn.engine.learner import LocalLearner
from locallearn.engine.results import StepResult
from locallearn.engine.sums import EpochSums

Made = TypeVar("Made")
State = dict[str, Any]


class Team:
    """One process that trains the whole network by itself; `distributed` has those of several.

    All processes call the same methods in the same order, since they meet in them. Exceptions, in
    which nobody is met: :meth:`request_stop`, at any moment; :meth:`progress` and :meth:`writing`,
    which those call that show or write something; :meth:`describe`, :meth:`going_on` and
    :meth:`resume_command`. And of stages that replay each has its own number of steps, and so of
    :meth:`tell`, :meth:`step` and :meth:`stop`.
    """

    is_first = True
    """Whether it writes the run's files and tells the user; one of several does."""
    is_alone = True
    replica = 0
    """Which of the copies of its stage it trains."""
    num_replicas = 1
    """How many such copies share each batch."""
    synchronizes_batch_norm = False
    """Whether copies of a stage normalise by whole batches."""

    # -- the start ------------------------------------------------------------------------------

    def together(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within: what one process raises is raised at all. No exchange may lie within.

        Arguments:
            what: is being done ("checking the settings"), for those who wait in vain for another.
        """
        return contextlib.nullcontext()

    def first(self, make: Callable[[], Made], what: str) -> Made:
        """What the first process makes, given to all; what it raises is raised at all.

        Arguments:
            make: called in the first process alone.
            what: is being done, as in :meth:`together`.
        """
        return make()

    def load(self, make: Callable[[], Made]) -> Made:
        """What each process makes for itself; of those of a host one before the others, which then
        find what it has downloaded or decoded."""
        return make()

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises UserError, at all, where they differ between processes; names them."""

    def describe(self) -> dict[str, Any]:
        """What the run's record says of how the work is spread; nothing of one process."""
        return {}

    def going_on(self, directory: Path, recorded: dict[str, Any]) -> list[str]:
        """Whether a run may go on in these processes.

        Arguments:
            directory: of the run.
            recorded: the environment that it was begun in, with what :meth:`describe` said.

        Returns:
            What is otherwise from here on, a line each, for the user.

        Raises:
            UserError: what must be as it was, and is not.
        """
        own = self.describe()
        notes = []
        then, now = (_num_normalised_apart(each) for each in (recorded, own))
        if then != now:
            by = "whole batches" if now == 1 else f"each of {now} parts of a batch"
            notes.append(
                f"BatchNorm, where the network has any, normalises by {by} from here on; so far by "
                f"{'whole batches' if then == 1 else f'each of {then} parts'}"
            )
        if recorded.get("replay") is not None and own.get("replay") is None:
            notes.append(
                f"the run was begun with --replay {recorded['replay']}; from here on nothing is "
                f"trained on twice"
            )
        return notes

    def join(
        self,
        learner: LocalLearner,
        settings: TrainConfig,
        twin: Callable[[], LocalLearner],
        images: Tensor,
    ) -> None:
        """Take up this process's part of a learner, which stays so to the end of the training.

        Arguments:
            learner: built in every process alike, and not trained yet.
            settings: resolved.
            twin: makes another such, to measure on.
            images: a few of the shape that it takes.

        Raises:
            UserError: it can't be spread so.
        """
        self._learner = learner

    def resume_command(self, directory: Path) -> str:
        """What the user types to go on with a run that was stopped."""
        return f"locallearn train --resume {directory}"

    # -- training -------------------------------------------------------------------------------

    def working(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """Around the whole training.

        Arguments:
            directory: of the run, with which a training that breaks off can be gone on with.
        """
        return contextlib.nullcontext()

    def training_loader(self, loader: EpochLoader[Any]) -> EpochLoader[Any]:
        """From the loader of the whole batches to that of this process's part of them."""
        return loader

    def tell(self, epoch: int, step: int, sums: EpochSums) -> None:
        """Before a step, where the training is: to those who watch it.

        Arguments:
            epoch, step: from 1.
            sums: of the epoch so far.
        """

    def progress(self, sums: EpochSums) -> tuple[float, float, tuple[float, ...]]:
        """Loss and accuracy (percent) of the epoch so far, and of each of several processes the
        share of the last seconds that it did not wait."""
        return sums.mean_loss()[0], sums.accuracy()[0], ()

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Around the writing of files."""
        return contextlib.nullcontext()

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """A training step of this process's part. Of a result, what other processes make is left
        out: ``logits`` are then (0, K), and the loss zero."""
        return self._learner.step(images, labels)

    def request_stop(self, signal_number: int) -> None:
        """All are to stop after some step; called at any moment, in any process."""
        self._requested = signal_number

    _requested: int | None = None

    def stop(self, *, is_last: bool) -> int | None:
        """After a step: the signal that all processes stop after this very step for, or None.

        Arguments:
            is_last: whether it is the last of its epoch, after which they go on to the evaluation.
        """
        return None if is_last else self._requested

    def left_early(self) -> int | None:
        """After the steps of an epoch: the signal for which they were not all of them, or None."""
        return None

    def stop_at_epoch(self) -> int | None:
        """The same, after an epoch."""
        return self._requested

    # -- between epochs -------------------------------------------------------------------------

    def total(self, sums: State) -> State:
        """The state of all processes' `EpochSums` together, from that of each."""
        return sums

    def own_part(self, sums: State) -> State:
        """The counterpart: what this process goes on from, so that the total is that."""
        return sums

    def recalibrate(self, loader: EpochLoader[Any], epoch: int) -> None:
        """As :func:`building.recalibrate`."""
        recalibrate(self._learner, loader, epoch)

    def evaluate(
        self, infer: Callable[[Tensor], Tensor], loader: EpochLoader[Any], num_classes: int
    ) -> Evaluation:
        """As :func:`evaluation.evaluate`; the same at all processes."""
        return evaluate(infer, loader, num_classes)

    def training_state(self) -> State | None:
        """Of the whole network, as :meth:`LocalLearner.training_state`, at the first process."""
        return self._learner.training_state()

    def load_training_state(self, state: State) -> None:
        """The counterpart, at every process."""
        self._learner.load_training_state(state)

    def collect_weights(self) -> None:
        """Have the first process's learner hold the weights of the whole network, as they are in
        the learners' present mode."""


def _num_normalised_apart(environment: dict[str, Any]) -> int:
    """Into how many parts batches are cut that BatchNorm knows apart."""
    replicas = re.search(r"data:(\d+)", environment.get("parallel", ""))
    return 1 if replicas is None or environment.get("sync_batch_norm") else int(replicas[1])
