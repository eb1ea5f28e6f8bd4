"""The memory that a run really takes, measured at its first steps and held against the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from locallearn.engine.config import TrainConfig
from locallearn.engine.learner import LocalLearner
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_MIB = 2**20
# The first step makes the optimizer's state; in the second it is there beside all else.
_NUM_STEPS = 3
_NUM_INFERENCES = 2


class PeakWatch:
    """Measures the first training steps, the first recalibration and the first inferences.

    Counted are the bytes of tensors beyond the weights and buffers: activations (the batch of
    images among them), gradients, and the optimizers' state.

    Arguments:
        learner: that runs.
        device: where.
        limit_bytes: what must not be passed; None where there is no limit.
        is_on: whether anything is measured at all.
        limit_text: as the user gave it.
    """

    def __init__(
        self,
        learner: LocalLearner,
        device: torch.device,
        limit_bytes: int | None,
        *,
        is_on: bool,
        limit_text: str = "",
    ) -> None:
        self.learner = learner
        self.device = device
        self.limit_bytes = limit_bytes
        self.limit_text = limit_text
        self.peaks: dict[str, int] = {}  # of what, bytes
        self.num_steps = 0 if is_on else _NUM_STEPS
        self.is_recalibration_due = is_on
        self.num_inferences = 0 if is_on else _NUM_INFERENCES

    @classmethod
    def of(cls, settings: TrainConfig, learner: LocalLearner, device: torch.device) -> PeakWatch:
        """For a run: measures those that fine-tune."""
        text, limit = settings.memory_limit, None
        if text is not None:
            from locallearn.engine.budget import parse_memory

            limit = parse_memory(text)
        is_on = settings.start_from is not None and device.type != "mps"  # which counts nothing
        return cls(learner, device, limit, is_on=is_on, limit_text=text or "")

    def step(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A training step; its batch is made within."""
        if self.num_steps == _NUM_STEPS:
            return call(*args, **kwargs)
        self.num_steps += 1
        return self._measured("a training step", 0, lambda: call(*args, **kwargs))

    def recalibration(self, call: Callable[[], None]) -> None:
        if not self.is_recalibration_due:
            return call()
        self.is_recalibration_due = False
        return self._measured("recalibrating BatchNorm", 0, call)

    def infer(self, images: Tensor) -> Tensor:
        """Logits of a batch, in evaluation."""
        if self.num_inferences == _NUM_INFERENCES:
            return self.learner.forward(images)
        self.num_inferences += 1
        return self._measured("an evaluation", images.nbytes, lambda: self.learner.forward(images))

    def _measured(self, what: str, num_bytes: int, call: Callable[[], R]) -> R:
        results: list[R] = []
        held = num_bytes + state_bytes(self.learner)
        peak = held + peak_memory_bytes(lambda: results.append(call()), self.device)
        self.peaks[what] = max(peak, self.peaks.get(what, 0))
        if self.limit_bytes is not None and peak > self.limit_bytes:
            raise UserError(
                f"{what} took {peak / _MIB:.1f} MiB, measured, which is above --memory-limit "
                f"{self.limit_text}. Give a smaller --batch-size, fewer --trained-blocks, or a "
                f"larger limit."
            )
        return results[0]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds of it, MiB."""
        if not self.peaks:
            return {}
        limit = self.limit_bytes
        return {
            "peak_memory_mib": max(self.peaks.values()) / _MIB,
            "peak_memory_mib_by_phase": {what: n / _MIB for what, n in self.peaks.items()},
            "memory_limit_mib": None if limit is None else limit / _MIB,
        }

    def state(self) -> dict[str, Any]:
        return {
            "peaks": self.peaks,
            "num_steps": self.num_steps,
            "is_recalibration_due": self.is_recalibration_due,
            "num_inferences": self.num_inferences,
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from there; None of a run of an earlier version."""
        if state is not None:
            self.peaks = dict(state["peaks"])
            self.num_steps = state["num_steps"]
            self.is_recalibration_due = state["is_recalibration_due"]
            self.num_inferences = state["num_inferences"]


def state_bytes(learner: LocalLearner) -> int:
    """Of the optimizers' tensors."""
    return sum(
        value.nbytes
        for optimizer in learner.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
