"""What an epoch adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locallearn.engine.results import StepResult


class EpochSums:
    """Loss and correct answers of the output and each block, on the device.

    Column 0 is the network's output, column i the i-th block.

    Arguments:
        names: of the blocks.
        device: of what steps yield.
        is_whole: whether this process trains all blocks; else the columns of others stay zero.
    """

    def __init__(self, names: list[str], device: torch.device, *, is_whole: bool = True) -> None:
        self.names = names
        self.is_whole = is_whole
        # MPS has no float64; there the sums are float32.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(1 + len(names), dtype=dtype, device=device)
        self.correct = torch.zeros(1 + len(names), dtype=torch.int64, device=device)
        self.num_images = 0
        self.has_logits = False
        self._no_loss = torch.zeros((), device=device)
        self._no_count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, result: StepResult, labels: Tensor) -> Tensor:
        """A step's; returns its losses, (columns,)."""
        blocks = result.block_losses
        if not self.is_whole:
            blocks = dict.fromkeys(self.names, self._no_loss) | blocks
        losses = torch.stack([result.loss, *(blocks[name] for name in self.names)])
        self.loss += losses * len(labels)
        is_output = len(result.logits) == len(labels)
        counts = [(result.logits.argmax(dim=1) == labels).sum() if is_output else self._no_count]
        for name in self.names:
            num_correct = result.block_num_correct.get(name)  # None for a rule without logits
            self.has_logits |= num_correct is not None
            counts.append(self._no_count if num_correct is None else num_correct)
        self.correct += torch.stack(counts)
        self.num_images += len(labels)
        return losses

    def mean_loss(self) -> list[float]:
        return [total / max(1, self.num_images) for total in self.loss.tolist()]

    def accuracy(self) -> list[float]:
        """Percent."""
        return [100 * count / max(1, self.num_images) for count in self.correct.tolist()]

    def state(self) -> dict[str, Any]:
        return {
            "loss": self.loss.cpu(),
            "correct": self.correct.cpu(),
            "num_images": self.num_images,
            "has_logits": self.has_logits,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.num_images = state["num_images"]
        self.has_logits = state["has_logits"]


def combined(states: Sequence[dict[str, Any]], *, num_images: int) -> dict[str, Any]:
    """The state of one `EpochSums`, of those of processes that each train a part.

    Columns of blocks that a process does not train are zero, so that nothing is rounded.
    """
    return {
        "loss": torch.stack([state["loss"] for state in states]).sum(0),
        "correct": torch.stack([state["correct"] for state in states]).sum(0),
        "num_images": num_images,
        "has_logits": any(state["has_logits"] for state in states),
    }


def scaled(state: dict[str, Any], num_images: int) -> dict[str, Any]:
    """As if so many images had been seen: the means stay."""
    scale = num_images / max(1, state["num_images"])
    correct = (state["correct"] * scale).round().long()
    return state | {"loss": state["loss"] * scale, "correct": correct, "num_images": num_images}


def nothing_of(state: dict[str, Any]) -> dict[str, Any]:
    """Of no image."""
    zeros = {name: torch.zeros_like(state[name]) for name in ("loss", "correct")}
    return state | zeros | {"num_images": 0}
