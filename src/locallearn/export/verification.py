"""An exported file beside the network that it was made of: the same answers, and at what speed.

Shapes: N batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from locallearn.engine import LocalLearner
from locallearn.engine.exits import EarlyExits
from locallearn.errors import UserError
from locallearn.export.description import LOGITS
from locallearn.export.files import ExportedModel
from locallearn.export.network import outputs_of

# Batches that a file must take: one image, an odd few, and many.
BATCH_SIZES = (1, 3, 32)
TIMED_BATCH_SIZES = (1, 32)
_NUM_ROUNDS = 15
_MAX_SECONDS = 20.0  # of the rounds of one batch size


class Checked(NamedTuple):
    """A batch to compare on.

    images: as the file takes them. inputs: the same as the learner takes them. labels: (N,), int64,
    or None where they are not known.
    """

    images: Tensor
    inputs: Tensor
    labels: Tensor | None


@dataclass
class Comparison:
    """Of a file with the network it was made of.

    Attributes:
        num_images: that both have seen.
        max_difference: output -> the largest absolute difference of its logits; NaN where either
            is.
        num_other_class: how many images the two put in different classes.
        num_labelled: images whose label is known.
        num_right, num_right_model: of these, how many the file and the network classify rightly.
    """

    num_images: int = 0
    max_difference: dict[str, float] = field(default_factory=dict)
    num_other_class: int = 0
    num_labelled: int = 0
    num_right: int = 0
    num_right_model: int = 0

    @property
    def accuracy(self) -> float | None:
        """Of the file, percent; None without labels."""
        return 100 * self.num_right / self.num_labelled if self.num_labelled else None

    @property
    def model_accuracy(self) -> float | None:
        """Of the network, percent; None without labels."""
        return 100 * self.num_right_model / self.num_labelled if self.num_labelled else None

    def add(
        self, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        """Count a batch.

        Arguments:
            given: what the file yields.
            expected: what the network does.
            labels: (N,), or None.
        """
        for name, logits in expected.items():
            difference = _difference(given[name], logits)
            self.max_difference[name] = max(
                self.max_difference.get(name, 0.0), difference, key=_nan_last
            )
        classes, expected_classes = given[LOGITS].argmax(1), expected[LOGITS].argmax(1)
        self.num_images += len(classes)
        self.num_other_class += int((classes != expected_classes).sum())
        if labels is not None:
            self.num_labelled += len(labels)
            self.num_right += int((classes == labels).sum())
            self.num_right_model += int((expected_classes == labels).sum())

    def check(self, tolerance: float) -> None:
        """Raises UserError where an output differs by more than the tolerance."""
        for name, difference in self.max_difference.items():
            if not difference <= tolerance:
                raise UserError(
                    f"the exported file is not the network: output {name!r} differs by up to "
                    f"{difference:.2g} on {self.num_images:,} images, and the tolerance "
                    f"is {tolerance:g}. Nothing was written."
                )


class Reference:
    """A learner's network in float32, as the file is to be.

    Arguments:
        learner: in evaluation mode.
        exits: whose logits are outputs too; None for none.
    """

    def __init__(self, learner: LocalLearner, exits: EarlyExits | None) -> None:
        self._model = learner.model
        self._exits = exits
        self._device = next(learner.model.parameters()).device

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Output name -> logits (N, K), on the CPU, of images as the learner takes them."""
        outputs = outputs_of(self._model, self._exits, inputs.to(self._device))
        return {name: logits.cpu() for name, logits in outputs.items()}


def compare(
    exported: ExportedModel,
    reference: Callable[[Tensor], dict[str, Tensor]],
    batches: Iterable[Checked],
) -> Comparison:
    """The two on the same batches."""
    comparison = Comparison()
    for images, inputs, labels in batches:
        comparison.add(exported(images), reference(inputs), labels)
    return comparison


def batches_of_sizes(batch: Checked) -> Iterator[Checked]:
    """Batches of 1, 3 and 32, of the images of one that may have fewer."""
    for size in BATCH_SIZES:
        places = torch.arange(size) % len(batch.images)
        yield Checked(batch.images[places], batch.inputs[places], None)


def times_in_turn_ms(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Name -> median time of a call, ms; in each round each is called once, after a first one."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + _MAX_SECONDS
    for _ in range(_NUM_ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - began))
        if time.perf_counter() > end:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def _difference(given: Tensor, expected: Tensor) -> float:
    """The largest absolute one; NaN where shapes differ, or either is not finite."""
    if given.shape != expected.shape:
        return float("nan")
    difference = (given.double() - expected.double()).abs().max().item()
    return difference if difference < float("inf") else float("nan")


def _nan_last(difference: float) -> float:
    return float("inf") if difference != difference else difference
