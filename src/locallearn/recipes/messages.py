"""What a run in a process of its own tells the process that began it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from locallearn.engine import Row, Snapshot


@dataclass(frozen=True)
class Started:
    """It trains: so many epochs are behind it, of so many."""

    epoch: int
    num_epochs: int


@dataclass(frozen=True)
class Busy:
    """Before it trains, or between: reading data, testing."""

    text: str


@dataclass(frozen=True)
class Noted:
    """What the user should know."""

    text: str


@dataclass(frozen=True)
class EpochDone:
    """An epoch's row of metrics.csv."""

    row: Row
    num_epochs: int


@dataclass(frozen=True)
class Finished:
    """All its results are there: what summary.json holds."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class Stopped:
    """On request; all is saved, or nothing was there to save."""


@dataclass(frozen=True)
class Failed:
    """message: in one line."""

    message: str


Outcome = Finished | Stopped | Failed
Message = Started | Busy | Noted | Snapshot | EpochDone | Outcome
