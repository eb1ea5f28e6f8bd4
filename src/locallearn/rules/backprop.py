"""Backpropagation: the baseline that needs the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from locallearn.rules.base import Requirement, Rule, register_rule


@register_rule
@dataclass(frozen=True, kw_only=True)
class Backprop(Rule):
    """The gradient of the output's cross-entropy through every layer."""

    name: ClassVar[str] = "bp"
    summary: ClassVar[str] = "backpropagation of the output's cross-entropy, the baseline"
    trains: ClassVar[str] = "nothing besides the network"
    requires: ClassVar[Requirement] = Requirement.END_TO_END
