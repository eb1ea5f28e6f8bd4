"""Blocks and batch size that fit a memory limit, and what backpropagation would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from locallearn.data import Dataset
from locallearn.engine.budget import (
    Choice,
    Comparison,
    Need,
    choose,
    compare,
    format_memory,
    learner_maker,
    parse_memory,
)
from locallearn.engine.config import TrainConfig, model_name

_MOST_NAMED = 12


@dataclass(frozen=True)
class Fit:
    """What was chosen to fit, and what else would have been needed.

    Arguments:
        limit: as the user gave it.
        choice: measured.
        comparison: of backpropagation at the same batch size.
        test_batch_size: images at a time in evaluation: the choice's, or the user's own.
    """

    limit: str
    choice: Choice
    comparison: Comparison
    test_batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """To train with, by name of `TrainConfig`."""
        return {
            "trained_blocks": self.choice.trained_blocks,
            "batch_size": self.choice.batch_size,
            "test_batch_size": self.test_batch_size,
        }

    def lines(self) -> list[str]:
        """What to tell the user."""
        choice, step, versus = self.choice, self.choice.step, self.comparison
        trained = _some(choice.trained)
        lines = [
            f"limit    {self.limit}: {trained} and the output layer learn, "
            f"{len(choice.frozen)} blocks frozen{_listed(choice.frozen)}",
            f"batch    {choice.batch_size} in training, {self.test_batch_size} in evaluation",
            f"peak     {format_memory(choice.peak_bytes)} measured: a training step "
            f"{format_memory(step.peak_bytes)} (activations, the batch of images among them, "
            f"{format_memory(step.activation_bytes)}, gradients "
            f"{format_memory(step.gradient_bytes)}, optimizer state "
            f"{format_memory(step.state_bytes)}), evaluation "
            f"{format_memory(choice.inference_bytes)}, recalibration "
            f"{format_memory(choice.recalibration_bytes)}; weights come on top",
        ]
        for words, plain, again in (
            ("same blocks", versus.same_blocks, versus.same_blocks_checkpointed),
            ("whole network", versus.whole, versus.whole_checkpointed),
        ):
            lines.append(
                f"bp       {words}: {self._said(plain)}; with checkpointing {self._said(again)}"
            )
        return lines

    def _said(self, need: Need) -> str:
        times = need.peak_bytes / self.choice.step.peak_bytes
        fits = f"fits up to batch {need.largest_batch}" if need.largest_batch else "fits no batch"
        if need.peak_bytes <= self.choice.limit_bytes:
            fits = "fits"
        return f"{format_memory(need.peak_bytes)} ({times:.1f}x, {fits})"

    def to_json(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "choice": _plain(self.choice.to_json()),
            "comparison": _plain(self.comparison.to_json()),
            "lines": self.lines(),
        }


def fit_to_limit(settings: TrainConfig, dataset: Dataset, given: Mapping[str, Any]) -> Fit:
    """Choose blocks and batch size by what they are measured to need.

    Arguments:
        settings: resolved, with a ``memory_limit``; its batch size is the largest wished for.
        dataset: tells the shape of the images, and the classes.
        given: what the user fixed, by name.

    Raises:
        UserError: nothing fits; tells the smallest limit that would do.
    """
    assert settings.memory_limit is not None
    limit = parse_memory(settings.memory_limit)
    device = torch.device(settings.device)
    inputs, num_classes = dataset.inputs, dataset.num_classes
    shape = (inputs.num_channels, *inputs.image_size)
    make = learner_maker(settings, inputs, num_classes, device=device)
    choice = choose(
        make,
        shape,
        num_classes,
        limit,
        rule=settings.rule,
        largest_batch=settings.batch_size,
        fixed_blocks=given.get("trained_blocks"),
        fixed_batch=given.get("batch_size"),
        device=device,
        what=model_name(settings),
    )
    comparison = compare(
        make,
        shape,
        num_classes,
        limit,
        batch_size=choice.batch_size,
        trained_blocks=choice.trained_blocks,
        device=device,
    )
    test_batch_size = given.get("test_batch_size", choice.test_batch_size)
    return Fit(settings.memory_limit, choice, comparison, test_batch_size)


def _some(names: tuple[str, ...]) -> str:
    if not names:
        return "no block"
    if len(names) > _MOST_NAMED:
        return f"{len(names)} blocks ({names[0]} to {names[-1]})"
    return ", ".join(names)


def _listed(names: tuple[str, ...]) -> str:
    return f" ({_some(names)})" if names else ""


def _plain(value: Any) -> Any:
    """As JSON reads it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
