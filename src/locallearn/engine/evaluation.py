"""Accuracy, loss and confusion of a model on an image source."""

from __future__ import annotations

from collections.abc import Callable
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
    pairs = torch.zeros(num_classes**2, dtype=torch.int64, device=loader.device)
    losses = []
    for images, labels in loader.epoch():
        logits = infer(images)
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        pair = labels * num_classes + logits.argmax(dim=1)
        pairs += torch.bincount(pair, minlength=num_classes**2)
    confusion = pairs.cpu().view(num_classes, num_classes)
    num = int(confusion.sum())
    loss = torch.stack(losses).cpu().double().sum().item() / num
    return Evaluation(loss, 100 * int(confusion.diagonal().sum()) / num, confusion)
