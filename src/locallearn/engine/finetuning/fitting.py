"""What fits a memory limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from locallearn.data import Dataset
from locallearn.engine.config import TrainConfig


@dataclass(frozen=True)
class Fit:
    """What was chosen.

    Arguments:
        settings: to train with: blocks, batch size, batch size of evaluation.
        lines: that say it.
    """

    settings: dict[str, Any]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "lines": list(self.lines)}


def fit_to_limit(settings: TrainConfig, dataset: Dataset, given: Mapping[str, Any]) -> Fit:
    raise NotImplementedError
