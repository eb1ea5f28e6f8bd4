"""What backpropagation would need where a local rule fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locallearn.engine.budget.needs import MakeLearner, batch_of, step_timeline
from locallearn.engine.budget.probing import PROBED, extended

BP, CHECKPOINTED = "bp", "bp:bp_memory=checkpoint"
_LARGEST_POWER = 10


@dataclass(frozen=True)
class Need:
    """What a form of backpropagation needs, in bytes, extended from steps of 3 and 4 images.

    Attributes:
        rule: which form.
        trained_blocks: what learns, as `TrainConfig.trained_blocks`.
        batch_size: N.
        peak_bytes: of activations, gradients and optimizer state together, over two steps.
        largest_batch: the largest batch whose peak is within the limit; 0 where none is.
    """

    rule: str
    trained_blocks: str
    batch_size: int
    peak_bytes: int
    largest_batch: int

    def to_json(self) -> dict[str, Any]:
        """Field -> value."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What backpropagation and checkpointed backpropagation need at the same batch size.

    Attributes:
        same_blocks: bp, for the blocks that the choice trains.
        same_blocks_checkpointed: the same with activation checkpointing, block by block.
        whole: bp of the whole network.
        whole_checkpointed: the same with activation checkpointing.
    """

    same_blocks: Need
    same_blocks_checkpointed: Need
    whole: Need
    whole_checkpointed: Need

    def to_json(self) -> dict[str, Any]:
        """Field -> value."""
        return dataclasses.asdict(self)


def compare(
    make_learner: MakeLearner,
    image_shape: Sequence[int],
    num_classes: int,
    limit_bytes: int,
    *,
    batch_size: int,
    trained_blocks: str,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Measure backpropagation on 3 and 4 images, and extend every moment of its two steps linearly.

    Activations are as large as the batch, gradients and state of a size of their own. It holds what
    backpropagation needs for 3 images, which may be more than the limit.

    Arguments:
        make_learner: see `MakeLearner`; called with the rules "bp" and "bp:bp_memory=checkpoint".
        image_shape: C, H, W.
        num_classes: K.
        limit_bytes: what `Need.largest_batch` is within.
        batch_size: N.
        trained_blocks: what the choice trains, as `TrainConfig.trained_blocks`.
        device: where learners are.
    """

    def need(rule: str, trained: str) -> Need:
        learner = make_learner(rule, trained)
        timelines = [
            step_timeline(learner, *batch_of(image_shape, n, num_classes, device)) for n in PROBED
        ]

        def peak(num_images: int) -> int:
            return extended(timelines, num_images).peak_bytes

        largest = 0
        if peak(1) <= limit_bytes:
            # Bisection: a larger batch never needs less.
            largest, too_large = 1, 2**_LARGEST_POWER
            while too_large - largest > 1:
                middle = (largest + too_large) // 2
                largest, too_large = (
                    (middle, too_large) if peak(middle) <= limit_bytes else (largest, middle)
                )
        return Need(rule, trained, batch_size, peak(batch_size), largest)

    with torch.random.fork_rng():
        same = [need(rule, trained_blocks) for rule in (BP, CHECKPOINTED)]
        whole = (
            same if trained_blocks == "all" else [need(rule, "all") for rule in (BP, CHECKPOINTED)]
        )
    return Comparison(*same, *whole)
