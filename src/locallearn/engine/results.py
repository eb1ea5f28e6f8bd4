"""What a training step says.

Shapes: N batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from locallearn.engine.units import UnitSignal


@dataclass
class StepResult:
    """What a training step yields; nothing here has been brought to the host.

    Attributes:
        logits: of the whole network, (N, K), detached.
        loss: cross-entropy of the logits, scalar, detached.
        block_losses: block name -> its local loss, scalar, in the order of the forward. Empty for
            a rule without local losses (bp, dfa, drtp, pepita).
        block_logits: block name -> its local logits, (N, K); only blocks whose rule has logits.
        block_num_correct: block name -> how many of these are highest at the label, scalar, int64.
    """

    logits: Tensor
    loss: Tensor
    block_losses: dict[str, Tensor] = field(default_factory=dict)
    block_logits: dict[str, Tensor] = field(default_factory=dict)
    block_num_correct: dict[str, Tensor] = field(default_factory=dict)


class LocalStep:
    """What the blocks say of a batch while they learn in :meth:`LocalLearner.local_step`."""

    def __init__(self) -> None:
        self.signals: dict[str, UnitSignal] = {}

    @property
    def block_losses(self) -> dict[str, Tensor]:
        """Block name -> its local loss, scalar, in the order of the forward."""
        return {n: s.loss for n, s in self.signals.items() if s.loss is not None}

    @property
    def block_logits(self) -> dict[str, Tensor]:
        """Block name -> its local logits, (N, K); only blocks whose rule has logits."""
        return {n: s.logits for n, s in self.signals.items() if s.logits is not None}

    @property
    def block_num_correct(self) -> dict[str, Tensor]:
        """Block name -> how many of these are highest at the label, scalar, int64."""
        return {n: s.num_correct for n, s in self.signals.items() if s.num_correct is not None}
