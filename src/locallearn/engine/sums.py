"""What an epoch adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locallearn.engine.results import StepResult


class EpochSums:
    """Loss and correct answers of the output and each block, on the device.

    Column 0 is the network's output, column i the i-th block. In one of several processes the
    columns of blocks that it does not train stay zero.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        # MPS has no float64; there the sums are float32.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(1 + len(names), dtype=dtype, device=device)
        self.correct = torch.zeros(1 + len(names), dtype=torch.int64, device=device)
        self.num_images = 0
        self.has_logits = False

    def add(self, result: StepResult, labels: Tensor) -> Tensor:
        """A step's; returns its losses, (columns,)."""
        nothing = torch.zeros_like(result.loss)
        blocks = [result.block_losses.get(name, nothing) for name in self.names]
        losses = torch.stack([result.loss, *blocks])
        self.loss += losses * len(labels)
        none = self.correct.new_zeros(())
        is_output = len(result.logits) == len(labels)
        counts = [(result.logits.argmax(dim=1) == labels).sum() if is_output else none]
        for name in self.names:
            num_correct = result.block_num_correct.get(name)  # None for a rule without logits
            self.has_logits |= num_correct is not None
            counts.append(none if num_correct is None else num_correct)
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
