"""What training steps, inference and recalibration hold in memory, measured.

Shapes: N batch, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from locallearn.data import InputSpec
from locallearn.engine.building import build_learner
from locallearn.engine.config import TrainConfig, rule_option_names
from locallearn.engine.learner import LocalLearner
from locallearn.engine.measuring import Mark, Timeline, memory_timeline
from locallearn.engine.optimizers import set_mode
from locallearn.rules import Requirement

MakeLearner = Callable[[str, str], LocalLearner]
"""From a rule, as `rules.parse_rule` reads it, and the blocks to train ("all", "none", or names by
commas) to a fresh learner, whose model may be stepped and thrown away."""


@dataclass(frozen=True)
class StepMemory:
    """What two training steps hold at most, beyond weights and buffers, in bytes.

    The batch of images counts as an activation.

    Attributes:
        batch_size: N.
        peak_bytes: the highest sum of activations, gradients and optimizer state.
        state_bytes: of that, the optimizers' state.
        gradient_bytes: the gradients that are there at once: of the largest block's parameters
            where each is updated as soon as it has run, of all where the update comes at the end.
        activation_bytes: the rest, and what updates need for a moment.
    """

    batch_size: int
    peak_bytes: int
    state_bytes: int
    gradient_bytes: int

    @property
    def activation_bytes(self) -> int:
        """What is neither state nor gradient."""
        return self.peak_bytes - self.state_bytes - self.gradient_bytes

    def to_json(self) -> dict[str, int]:
        """Field -> value."""
        return dataclasses.asdict(self) | {"activation_bytes": self.activation_bytes}


def learner_maker(
    settings: TrainConfig, inputs: InputSpec, num_classes: int, *, device: torch.device
) -> MakeLearner:
    """Fresh learners as a run's settings have them, with another rule or other blocks to train.

    Weights are drawn anew, since memory does not go by them.

    Arguments:
        settings: resolved.
        inputs: what the network will see.
        num_classes: K.
        device: where it is to train.
    """
    of_the_rule: dict[str, Any] = dict.fromkeys(rule_option_names())
    of_the_rule |= {"group_blocks": 1, "head_after_pool": False}

    def make(rule: str, trained_blocks: str) -> LocalLearner:
        own = {} if rule == settings.rule else of_the_rule
        changed = dataclasses.replace(settings, rule=rule, trained_blocks=trained_blocks, **own)
        return build_learner(changed, inputs, num_classes, device=device)

    return make


def batch_of(
    image_shape: Sequence[int], num_images: int, num_classes: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Noise, (N, C, H, W), and labels."""
    images = torch.randn(num_images, *image_shape, device=device)
    return images, torch.arange(num_images, device=device) % num_classes


def step_timeline(
    learner: LocalLearner, images: Tensor, labels: Tensor, num_steps: int = 2
) -> Timeline:
    """What steps hold: in the first the optimizers' state is made, in the next it is there
    while activations are."""

    def steps(mark: Mark) -> None:
        for number in range(num_steps):
            mark(f"step {number}")
            learner.step(as_loaded(images), labels.clone())

    learner.build(images)
    for optimizer in learner.optimizers.values():
        optimizer.state.clear()
    return memory_timeline(steps, images.device)


def measure_step(
    make_learner: Callable[[], LocalLearner], images: Tensor, labels: Tensor
) -> StepMemory:
    """Take two steps of a fresh learner and count what they hold.

    Arguments:
        make_learner: a learner whose model may be trained and thrown away.
        images: (N, C, H, W), on its device; a copy of them is what the steps hold.
        labels: (N,), int64.
    """
    with torch.random.fork_rng():
        return memory_of_steps(make_learner(), images, labels)


def memory_of_steps(learner: LocalLearner, images: Tensor, labels: Tensor) -> StepMemory:
    """The same of a learner that is there, whose optimizers forget what they knew."""
    timeline = step_timeline(learner, images, labels)
    return StepMemory(
        len(labels), timeline.peak_bytes, state_bytes(learner), gradient_bytes(learner)
    )


def measure_inference(make_learner: Callable[[], LocalLearner], images: Tensor) -> int:
    """Bytes that logits of a batch need at most, the batch itself among them."""
    with torch.random.fork_rng():
        learner = make_learner().build(images)
        return inference_timeline(learner, images).peak_bytes


def inference_timeline(learner: LocalLearner, images: Tensor) -> Timeline:
    """What an inference holds."""
    learner.build(images)
    return memory_timeline(lambda mark: learner(as_loaded(images)), images.device)


def measure_recalibration(make_learner: Callable[[], LocalLearner], images: Tensor) -> int:
    """Bytes that re-estimating BatchNorm's statistics on a batch needs at most."""
    with torch.random.fork_rng():
        learner = make_learner().build(images)
        call = lambda mark: learner.recalibrate(iter([as_loaded(images)]))  # noqa: E731
        return memory_timeline(call, images.device).peak_bytes


def as_loaded(images: Tensor) -> Tensor:
    """A copy in the memory format that a loader makes batches in."""
    if images.ndim != 4:
        return images.clone()
    return images.clone(memory_format=torch.channels_last)


def state_bytes(learner: LocalLearner) -> int:
    """Of all optimizers' tensors."""
    return sum(map(optimizer_bytes, learner.optimizers.values()))


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Of an optimizer's state."""
    held = (value for of_one in optimizer.state.values() for value in of_one.values())
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


def parameter_bytes(optimizer: Optimizer) -> int:
    """Of what an optimizer trains."""
    return sum(
        p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"]
    )


def gradient_bytes(learner: LocalLearner) -> int:
    """Of the gradients that are there at once."""
    sizes = {name: parameter_bytes(o) for name, o in learner.optimizers.items()}
    if learner.rule.requires is Requirement.END_TO_END:
        is_fused = "" not in sizes
        return max(sizes.values(), default=0) if is_fused else sum(sizes.values())
    rest = sizes.pop("", 0)
    largest = max(sizes.values(), default=0)
    # Blocks that wait for the output's error are updated while the output layer's gradients wait.
    waits = learner.rule.requires is not Requirement.LOCAL
    return rest + largest if waits else max(rest, largest)


def state_ratio(learner: LocalLearner) -> float:
    """Bytes of state for a byte of parameters, of the learner's optimizer."""
    reference = next(learner.model.parameters())
    parameter = torch.nn.Parameter(torch.zeros(1024, dtype=reference.dtype))
    optimizer = learner.make_optimizer([parameter])
    set_mode([optimizer], training=True)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer_bytes(optimizer) / parameter_bytes(optimizer)
