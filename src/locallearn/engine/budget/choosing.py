"""Which blocks to train, and on how many images at a time, within a limit of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locallearn.engine.budget.amounts import format_memory
from locallearn.engine.budget.needs import (
    MakeLearner,
    StepMemory,
    batch_of,
    inference_timeline,
    measure_recalibration,
    memory_of_steps,
    state_bytes,
)
from locallearn.engine.budget.probing import (
    LocalProbe,
    WholeProbe,
    has_norm_in_training,
    make_probe,
)
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError

LARGEST_BATCH = 32
# Of fewer images a trained block's BatchNorm tells little.
_USUAL_BATCH = 8
_SMALLER_BATCHES = (4, 2, 1)


@dataclass(frozen=True)
class Choice:
    """What is to be trained, and what that was measured to need.

    Attributes:
        limit_bytes: what was given.
        batch_size: images a training step.
        test_batch_size: images at a time in evaluation.
        trained: names of the blocks that learn, in the order of the forward.
        frozen: names of the others.
        step: what two steps at this choice held.
        inference_bytes: what an evaluation batch held, the optimizers' state beside it.
        recalibration_bytes: what re-estimating BatchNorm's statistics on a training batch held,
            the state beside it.
    """

    limit_bytes: int
    batch_size: int
    test_batch_size: int
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    step: StepMemory
    inference_bytes: int
    recalibration_bytes: int

    @property
    def trained_blocks(self) -> str:
        """As `TrainConfig.trained_blocks` has it."""
        if not self.frozen:
            return "all"
        return ",".join(self.trained) or "none"

    @property
    def peak_bytes(self) -> int:
        """The highest of the three."""
        return max(self.step.peak_bytes, self.inference_bytes, self.recalibration_bytes)

    def to_json(self) -> dict[str, Any]:
        """Field -> value."""
        return dataclasses.asdict(self) | {"step": self.step.to_json()}


def choose(
    make_learner: MakeLearner,
    image_shape: Sequence[int],
    num_classes: int,
    limit_bytes: int,
    *,
    rule: str,
    largest_batch: int = LARGEST_BATCH,
    fixed_blocks: str | None = None,
    fixed_batch: int | None = None,
    device: torch.device | str = "cpu",
    what: str = "the model",
) -> Choice:
    """Pick blocks and batch size such that activations, gradients and optimizer state together
    stay within a limit at every moment; measured.

    The output layer always learns. The batch is of 8 images at first, or of 4, 2 or 1 where not
    even the output layer can learn of 8 (BatchNorm in training needs 2). Then blocks are taken from
    the output towards the input, each that still fits at this batch size, up to the first that does
    not. A local rule could train those in front of it all the same, frozen blocks cost it nothing
    wherever they are; but nothing tells such a block what the frozen ones behind it make of what it
    yields. Name blocks to have it so. At last the batch becomes the largest power of two up to
    ``largest_batch`` that fits. The evaluation batch is the largest power of two, up to the same,
    whose inference fits beside the optimizers' state.

    What a choice needs is predicted from steps of 3 and 4 images (`probing`), so that the search
    holds little; then the choice itself is measured, and where that is more than the limit, the
    batch is halved, or a block given up, until it is not.

    Arguments:
        make_learner: see `MakeLearner`.
        image_shape: C, H, W.
        num_classes: K.
        limit_bytes: of activations, gradients and optimizer state together; weights and buffers
            come on top.
        rule: as make_learner takes it.
        largest_batch: images, at most.
        fixed_blocks: train these, as `TrainConfig.trained_blocks`; None chooses.
        fixed_batch: train on so many images at a time; None chooses.
        device: where learners are.
        what: names model and images in errors.

    Raises:
        UserError: nothing fits; tells the smallest that would.
    """
    chooser = _Chooser(
        make_learner, image_shape, num_classes, limit_bytes, rule, fixed_blocks, device, what
    )
    with torch.random.fork_rng():
        return chooser.choose(largest_batch, fixed_batch)


class _Chooser:
    def __init__(
        self,
        make_learner: MakeLearner,
        image_shape: Sequence[int],
        num_classes: int,
        limit_bytes: int,
        rule: str,
        fixed_blocks: str | None,
        device: torch.device | str,
        what: str,
    ) -> None:
        self._make, self._rule, self._limit = make_learner, rule, limit_bytes
        self._shape, self._num_classes = tuple(image_shape), num_classes
        self._device, self._what = torch.device(device), what
        self._fixed = fixed_blocks
        self._last: tuple[list[str], LocalLearner] | None = None

    def choose(self, largest_batch: int, fixed_batch: int | None) -> Choice:
        probe = make_probe(
            self._make, self._rule, self._shape, self._num_classes, self._limit, self._device
        )
        trained = [] if self._fixed is None else self._named(self._fixed)
        smallest = self._smallest(trained)
        if fixed_batch is not None and fixed_batch < smallest:
            raise UserError(
                f"a batch of {fixed_batch} is too small: BatchNorm in a trained block needs two "
                f"images. Give at least {smallest}."
            )
        batch_size = self._first_batch(probe, trained, smallest, largest_batch, fixed_batch)
        if self._fixed is None:
            trained = self._taken(probe, batch_size)
        if fixed_batch is None:
            larger = batch_size
            while larger * 2 <= largest_batch:
                larger *= 2
                if self._fits(probe, trained, larger):
                    batch_size = larger
        return self._measured(probe, trained, batch_size, largest_batch, fixed_batch is not None)

    def _named(self, blocks: str) -> list[str]:
        """The blocks that learn where these are named."""
        learner = self._make(self._rule, blocks).build(self._batch(2)[0])
        if learner.plan is None:  # bp of all
            learner = self._make(self._rule, "none").build(self._batch(2)[0])
            assert learner.plan is not None
            return [block.name for block in learner.plan.blocks]
        return [block.name for block in learner.plan.blocks if not block.is_frozen]

    def _smallest(self, trained: Sequence[str]) -> int:
        return 2 if has_norm_in_training(self._learner(trained)) else 1

    def _first_batch(
        self,
        probe: LocalProbe | WholeProbe,
        trained: Sequence[str],
        smallest: int,
        largest: int,
        fixed: int | None,
    ) -> int:
        """The batch that blocks are taken at."""
        sizes = [fixed] if fixed else [_USUAL_BATCH, *_SMALLER_BATCHES]
        sizes = [n for n in sizes if fixed or smallest <= n <= max(largest, smallest)]
        for size in sizes:
            if self._fits(probe, trained, size):
                return size
        return sizes[-1]  # measured, it may yet fit; if not, that is the figure to tell

    def _taken(self, probe: LocalProbe | WholeProbe, batch_size: int) -> list[str]:
        taken: list[str] = []
        for name in reversed(probe.names):
            wider = [name, *taken]
            needs_more = batch_size == 1 and self._smallest(wider) > 1
            if name not in probe.candidates or needs_more:
                break
            if not self._fits(probe, wider, batch_size):
                break
            taken = wider
        return taken

    def _fits(
        self, probe: LocalProbe | WholeProbe, trained: Sequence[str], batch_size: int
    ) -> bool:
        return probe.step_bytes(trained, batch_size) <= self._limit

    def _measured(
        self,
        probe: LocalProbe | WholeProbe,
        trained: list[str],
        batch_size: int,
        largest_batch: int,
        is_fixed: bool,
    ) -> Choice:
        """The choice, or one below it, that is within the limit by measurement."""
        while True:
            step = self._measure(trained, batch_size)
            if step.peak_bytes <= self._limit:
                break
            smallest = self._smallest(trained)
            can_give_up = bool(trained) and self._fixed is None
            if not is_fixed and batch_size // 2 >= (_USUAL_BATCH if can_give_up else smallest):
                batch_size //= 2
            elif can_give_up:
                trained = trained[1:]
            else:
                raise self._too_little(trained, step, is_fixed)
        test_batch = batch_size
        size = 1
        while size <= max(largest_batch, batch_size):
            if probe.inference_bytes(trained, size) <= self._limit:
                test_batch = size
            size *= 2
        inference, recalibration = self._evaluated(trained, test_batch, batch_size)
        while inference > self._limit and test_batch > 1:
            test_batch //= 2
            inference, recalibration = self._evaluated(trained, test_batch, batch_size)
        if max(inference, recalibration) > self._limit:
            raise self._too_little(
                trained,
                dataclasses.replace(step, peak_bytes=max(inference, recalibration)),
                is_fixed,
            )
        return Choice(
            limit_bytes=self._limit,
            batch_size=batch_size,
            test_batch_size=test_batch,
            trained=tuple(trained),
            frozen=tuple(name for name in probe.names if name not in trained),
            step=step,
            inference_bytes=inference,
            recalibration_bytes=recalibration,
        )

    def _measure(self, trained: Sequence[str], batch_size: int) -> StepMemory:
        return memory_of_steps(self._learner(trained), *self._batch(batch_size))

    def _evaluated(
        self, trained: Sequence[str], test_batch: int, batch_size: int
    ) -> tuple[int, int]:
        """Peaks of inference and recalibration, with the optimizers' state."""
        learner = self._learner(trained)  # has made its steps
        state = state_bytes(learner)
        inference = inference_timeline(learner, self._batch(test_batch)[0]).peak_bytes
        recalibration = measure_recalibration(lambda: learner, self._batch(batch_size)[0])
        return state + inference, state + recalibration

    def _learner(self, trained: Sequence[str]) -> LocalLearner:
        """One that trains these; the last one is kept."""
        if self._last is None or self._last[0] != list(trained):
            self._last = None  # before the next is made
            learner = self._make(self._rule, ",".join(trained) or "none")
            self._last = list(trained), learner.build(self._batch(2)[0])
        return self._last[1]

    def _batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_of(self._shape, num_images, self._num_classes, self._device)

    def _too_little(self, trained: Sequence[str], step: StepMemory, is_fixed: bool) -> UserError:
        what = (
            f"{len(trained)} of its blocks and its output layer"
            if trained
            else ("its output layer")
        )
        shape = "x".join(map(str, self._shape))
        enough = -(-step.peak_bytes // 2**20)
        hints = [f"{enough}MiB"]
        if is_fixed and step.batch_size > 1:
            hints.append("a smaller --batch-size")
        if self._fixed not in (None, "none"):
            hints.append("fewer --trained-blocks")
        hints.append("a smaller --image-size")
        if step.state_bytes:
            hints.append("--optimizer sgd")
        return UserError(
            f"the smallest that can learn of {self._what} at {shape} is {what} with a batch of "
            f"{step.batch_size}, which takes {format_memory(step.peak_bytes)}; --memory-limit is "
            f"{format_memory(self._limit)}. Give at least {', '.join(hints[:-1])} or {hints[-1]}."
        )
