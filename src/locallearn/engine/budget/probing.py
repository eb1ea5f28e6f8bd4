"""What each block of a network needs to learn, from two steps on few images.

A local rule's step needs at its highest: the optimizers' state of all that learns, and whatever the
block that is learning at that moment needs. So blocks can be looked at one by one, and a choice of
them predicted. For the look, every block that could fit learns in one step, and its optimizer's
state is dropped as soon as it has been updated: no more is held than one block needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.budget.needs import (
    MakeLearner,
    as_loaded,
    batch_of,
    inference_timeline,
    optimizer_bytes,
    parameter_bytes,
    state_ratio,
    step_timeline,
)
from locallearn.engine.learner import LocalLearner
from locallearn.engine.measuring import Mark, Timeline, memory_timeline
from locallearn.rules import Requirement, parse_rule

# Batches that timelines are taken of: BatchNorm holds less of smaller ones, which it normalises by
# running statistics.
PROBED = (3, 4)


def extended(timelines: Sequence[Timeline], num_images: int) -> Timeline:
    """The timeline of a batch of so many, from those of `PROBED`."""
    first, second = PROBED
    return timelines[0].extended(timelines[1], (num_images - first) / (second - first))


class LocalProbe:
    """Predicts what a choice of blocks needs under a local rule.

    Arguments:
        make_learner: see `MakeLearner`.
        rule: a local one.
        image_shape: C, H, W.
        num_classes: K.
        limit_bytes: blocks whose state and gradients alone are more are not looked at.
        device: of the learners.
    """

    def __init__(
        self,
        make_learner: MakeLearner,
        rule: str,
        image_shape: Sequence[int],
        num_classes: int,
        limit_bytes: int,
        device: Any,
    ) -> None:
        def batch(num_images: int) -> tuple[Tensor, Tensor]:
            return batch_of(image_shape, num_images, num_classes, device)

        learner = make_learner(rule, "all").build(batch(PROBED[0])[0])
        ratio = state_ratio(learner)
        sizes = {name: parameter_bytes(o) for name, o in learner.optimizers.items()}
        self.names = learner.block_names
        self.state = {name: round(ratio * sizes.get(name, 0)) for name in [*self.names, ""]}
        least = {name: size + round(ratio * size) for name, size in sizes.items()}
        self.candidates = [
            name for name in self.names if least.get(name, 0) + self.state[""] <= limit_bytes
        ]
        if len(self.candidates) < len(self.names):
            chosen = ",".join(self.candidates) or "none"
            learner = make_learner(rule, chosen).build(batch(PROBED[0])[0])
        self.needs_two = has_norm_in_training(learner)
        self._steps = [_probed_step(learner, *batch(n)) for n in PROBED]
        learner = make_learner(rule, "none").build(batch(PROBED[0])[0])
        self._fronts = [_probed_step(learner, *batch(n)) for n in PROBED]
        self._inferences = [inference_timeline(learner, batch(n)[0]) for n in PROBED]

    def step_bytes(self, trained: Sequence[str], num_images: int) -> int:
        """Predicted peak of a step that trains these and the output layer."""
        step, front = extended(self._steps, num_images), extended(self._fronts, num_images)
        # Frozen blocks hold what they do where all are frozen, and less where one learns instead.
        highest = max(
            max(values) for label, values in front.segments if not label.endswith(_UPDATE)
        )
        for label, values in step.segments:
            name, _, phase = label.rpartition("|")
            if phase not in (_LEARN, _UPDATE):
                highest = max(highest, *values)
            elif name in trained or name == "":
                own = self.state[name] if phase == _UPDATE else 0
                highest = max(highest, max(values) - own)
        return highest + self.state_of(trained)

    def inference_bytes(self, trained: Sequence[str], num_images: int) -> int:
        """Predicted peak of an inference beside these blocks' state."""
        return extended(self._inferences, num_images).peak_bytes + self.state_of(trained)

    def state_of(self, trained: Sequence[str]) -> int:
        """Bytes of the optimizers' state."""
        return sum(self.state[name] for name in [*trained, ""])


_BETWEEN, _LEARN, _UPDATE = "between", "learn", "update"


def _probed_step(learner: LocalLearner, images: Tensor, labels: Tensor) -> Timeline:
    """A step's timeline, in segments "block|learn" and "block|update", of the output layer
    "|update" alone, and "|between"; frozen modules have segments of their own."""

    def step(mark: Mark) -> None:
        mark(f"|{_BETWEEN}")
        with ExitStack() as stack:
            for unit in learner.units:
                stack.enter_context(_marking(unit, mark))
            for name, optimizer in learner.optimizers.items():
                for handle in (
                    optimizer.register_step_pre_hook(_marker(mark, f"{name}|{_UPDATE}")),
                    optimizer.register_step_post_hook(_forget),
                ):
                    stack.callback(handle.remove)
            learner.step(as_loaded(images), labels.clone())

    return memory_timeline(step, images.device)


@contextmanager
def _marking(unit: Any, mark: Mark) -> Iterator[None]:
    """Within: the unit's step is a segment."""
    inner = unit.step

    def step(*args: Any, **kwargs: Any) -> Any:
        mark(f"{unit.name}|{_LEARN}")
        result = inner(*args, **kwargs)
        mark(f"|{_BETWEEN}")
        return result

    unit.step = step
    try:
        yield
    finally:
        del unit.step


def _marker(mark: Mark, label: str) -> Callable[..., None]:
    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        mark(label)

    return hook


def _forget(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    optimizer.state.clear()


class WholeProbe:
    """Predicts what a choice of blocks needs under any rule, from steps of just this choice.

    Where graphs are kept until the network's output is there, blocks can't be told apart.
    Arguments are those of :class:`LocalProbe`.
    """

    def __init__(
        self,
        make_learner: MakeLearner,
        rule: str,
        image_shape: Sequence[int],
        num_classes: int,
        limit_bytes: int,
        device: Any,
    ) -> None:
        self._make, self._rule, self._device = make_learner, rule, device
        self._shape, self._num_classes = image_shape, num_classes
        images, _ = self._batch(PROBED[0])
        # Of all blocks, so that all are known; only named ones would be frozen.
        learner = make_learner(rule, "none").build(images)
        assert learner.plan is not None
        self._ratio = state_ratio(learner)
        self._limit = limit_bytes
        self.names = [block.name for block in learner.plan.blocks]
        held = {
            block.name: sum(p.numel() * p.element_size() for p in block.module.parameters())
            for block in learner.plan.blocks
        }
        self._least = {name: round((1 + self._ratio) * size) for name, size in held.items()}
        self.candidates = [name for name in self.names if self._least[name] <= limit_bytes]
        self.needs_two = True
        self._steps: dict[tuple[str, ...], list[Timeline]] = {}
        self._states: dict[tuple[str, ...], int] = {}
        self._inferences = [inference_timeline(learner, self._batch(n)[0]) for n in PROBED]

    def step_bytes(self, trained: Sequence[str], num_images: int) -> int:
        """Predicted peak of a step that trains these and the output layer."""
        least = sum(self._least[name] for name in trained)
        if least > self._limit:
            return least
        return extended(self._probed(trained), num_images).peak_bytes

    def inference_bytes(self, trained: Sequence[str], num_images: int) -> int:
        """Predicted peak of an inference beside these blocks' state."""
        self._probed(trained)
        inference = extended(self._inferences, num_images).peak_bytes
        return inference + self._states[tuple(trained)]

    def _probed(self, trained: Sequence[str]) -> list[Timeline]:
        key = tuple(trained)
        if key not in self._steps:
            learner = self._make(self._rule, ",".join(key) or "none")
            self._steps[key] = [step_timeline(learner, *self._batch(n)) for n in PROBED]
            self._states[key] = sum(map(optimizer_bytes, learner.optimizers.values()))
        return self._steps[key]

    def _batch(self, num_images: int) -> tuple[Tensor, Tensor]:
        return batch_of(self._shape, num_images, self._num_classes, self._device)


def has_norm_in_training(learner: LocalLearner) -> bool:
    """Whether some BatchNorm normalises by the batch, of which it needs two images."""
    learner.train()
    norms = (m for m in learner.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.training for norm in norms)


def make_probe(
    make_learner: MakeLearner,
    rule: str,
    image_shape: Sequence[int],
    num_classes: int,
    limit_bytes: int,
    device: Any,
) -> LocalProbe | WholeProbe:
    """What fits the rule."""
    is_local = parse_rule(rule).requires is Requirement.LOCAL
    kind = LocalProbe if is_local else WholeProbe
    return kind(make_learner, rule, image_shape, num_classes, limit_bytes, device)
