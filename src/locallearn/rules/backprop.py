"""Backpropagation: the baseline that needs the whole network, and its memory-saving forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from locallearn.errors import UserError
from locallearn.rules.base import Information, Requirement, Rule, register_rule

BP_MEMORY = ("plain", "checkpoint", "accumulate:N", "fused-optimizer")


@register_rule
@dataclass(frozen=True, kw_only=True)
class Backprop(Rule):
    """The gradient of the output's cross-entropy through every layer.

    Arguments:
        bp_memory: what is done to need less memory.
            "plain": nothing.
            "checkpoint": each block keeps its input alone, and runs again in the backward.
            "accumulate:N": N smaller batches one after the other, one update. BatchNorm sees each
            of them by itself, so that with it the weights are not quite plain ones'.
            "fused-optimizer": each parameter is updated in the backward, as soon as its gradient is
            there, which is then freed.
    """

    name: ClassVar[str] = "bp"
    summary: ClassVar[str] = "backpropagation of the output's cross-entropy, the baseline"
    trains: ClassVar[str] = "nothing besides the network"
    requires: ClassVar[Requirement] = Requirement.END_TO_END
    learns_from: ClassVar[frozenset[Information]] = frozenset(Information)

    bp_memory: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_known = self.bp_memory in BP_MEMORY and self.bp_memory != "accumulate:N"
        if not is_known and not re.fullmatch(r"accumulate:[1-9]\d*", self.bp_memory):
            raise UserError(
                f"unknown bp_memory {self.bp_memory!r}. Valid: {', '.join(BP_MEMORY)} "
                f"(N batches, e.g. accumulate:4)."
            )

    @property
    def num_accumulated(self) -> int:
        """N of "accumulate:N"; 1 for the other forms."""
        kind, _, number = self.bp_memory.partition(":")
        return int(number) if kind == "accumulate" else 1
