"""How right each block's own head is: over the epochs, and on the test set.

Shapes: K classes, E epochs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from locallearn.analysis.latents import BlockView, local_logits, observe
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError

_NOT_BLOCKS = ("train", "test", "val")


@dataclass(frozen=True)
class Curves:
    """Accuracies in percent after each epoch, E numbers each.

    Arguments:
        epochs: from 1.
        train, test: of the network.
        blocks: block name -> its own head's, on the training images.
    """

    epochs: list[int]
    train: list[float]
    test: list[float]
    blocks: dict[str, list[float]]


def read_curves(path: Path) -> Curves:
    """A run's metrics.csv. Raises UserError where it is missing, empty or not what a run writes."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run has no finished epoch yet.")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else None
    except (TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no metrics.csv of a run ({error}).") from error
    if columns is None:
        raise UserError(f"{path} holds no epoch: the run has finished none yet.")
    if missing := {"epoch", "train_acc", "test_acc"} - set(columns):
        raise UserError(f"{path} is no metrics.csv of a run: no column {min(missing)}.")
    suffix = "_acc"
    names = [name.removesuffix(suffix) for name in columns if name.endswith(suffix)]
    return Curves(
        [int(epoch) for epoch in columns["epoch"]],
        columns["train_acc"],
        columns["test_acc"],
        {name: columns[name + suffix] for name in names if name not in _NOT_BLOCKS},
    )


def head_accuracies(
    learner: LocalLearner, views: Sequence[BlockView], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], float]:
    """Block name -> its own head's accuracy, percent; and the network's.

    Arguments:
        learner: in evaluation mode.
        views: blocks whose heads give logits.
        batches: images and labels; at least one.
    """
    right = dict.fromkeys([view.name for view in views], 0)
    right_of_network = total = 0
    for batch in observe(learner, views, batches):
        total += len(batch.labels)
        right_of_network += int((batch.logits.argmax(dim=1) == batch.labels).sum())
        for view in views:
            logits = local_logits(view, batch.features[view.name])
            assert logits is not None
            right[view.name] += int((logits.argmax(dim=1) == batch.labels).sum())
    return {name: 100 * num / total for name, num in right.items()}, 100 * right_of_network / total
