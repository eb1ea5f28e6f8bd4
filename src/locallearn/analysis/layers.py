"""How right each block's own head is: over the epochs, and on the test set.

Shapes: K classes, E epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from locallearn.analysis.latents import BlockView, local_logits, observe
from locallearn.engine import RunDirectory
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError


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


def read_curves(run: RunDirectory) -> Curves:
    """Of a run's metrics.csv; nan where a value is missing.

    Raises UserError where the file is not what a run writes, or has no epoch.
    """
    metrics = run.read_metrics()
    if not metrics.num_epochs:
        raise UserError(f"{run.metrics_path} holds no epoch: the run has finished none yet.")
    columns = {
        name: [math.nan if value is None else value for value in values]
        for name, values in metrics.columns.items()
    }
    return Curves(
        list(range(1, metrics.num_epochs + 1)),
        columns["train_acc"],
        columns["test_acc"],
        {name: columns[f"{name}_acc"] for name in metrics.blocks()},
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
