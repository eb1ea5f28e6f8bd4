"""Accuracy, loss and confusion of a model on an image source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.data.loader import EpochLoader


@dataclass(frozen=True)
class Evaluation:
    """Of all images of a source.

    loss: mean cross-entropy; accuracy: percent; confusion: (K, K), int64, true class by row and
    predicted class by column.
    """

    loss: float
    accuracy: float
    confusion: Tensor

    @property
    def class_accuracy(self) -> Tensor:
        """(K,), float64, percent; NaN for a class without images."""
        return 100 * self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the class accuracies, percent: every class counts alike, however many images it
        has. Classes without images are left out."""
        return float(self.class_accuracy.nanmean())


@torch.no_grad()
def evaluate(
    infer: Callable[[Tensor], Tensor], loader: EpochLoader[Any], num_classes: int
) -> Evaluation:
    """Run ``infer``, from images to logits (N, K), over an epoch of ``loader``."""
    return evaluation_of(*tally(infer, loader.epoch(), num_classes))


@torch.no_grad()
def tally(
    infer: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> tuple[Tensor, Tensor]:
    """What an evaluation adds up over (images, labels) batches, so that several tallies can be
    added: the confusion, (K, K), int64, and the sum of the losses, float64 scalar, on the host."""
    pairs: Tensor | None = None
    losses = []
    for images, labels in batches:
        logits = infer(images)
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        pair = labels * num_classes + logits.argmax(dim=1)
        counts = torch.bincount(pair, minlength=num_classes**2)
        pairs = counts if pairs is None else pairs + counts
    if pairs is None:
        confusion = torch.zeros((num_classes, num_classes), dtype=torch.int64)
        return confusion, torch.zeros((), dtype=torch.float64)
    return pairs.cpu().view(num_classes, num_classes), torch.stack(losses).cpu().double().sum()


def evaluation_of(confusion: Tensor, loss: Tensor) -> Evaluation:
    """Of what :func:`tally` has added up."""
    num = int(confusion.sum())
    return Evaluation(loss.item() / num, 100 * int(confusion.diagonal().sum()) / num, confusion)
