"""What was measured of a step of a run, beside the runs that differ in the seed alone.

step.json      peak_activation_mib, environment; `locallearn reproduce` writes it
seed-0/        run directories
seed-1/
"""

from __future__ import annotations

import json
import math
from pathlib import Path


def step_path(run: Path) -> Path:
    """Where it is kept for a run directory."""
    return run.parent / "step.json"


def read_peak_mib(run: Path) -> float | None:
    """The most that a step of such a run held beyond parameters, optimizer state and images; None
    where that was not measured."""
    try:
        value = json.loads(step_path(run).read_text(encoding="utf-8"))["peak_activation_mib"]
        peak = float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return peak if math.isfinite(peak) else None
