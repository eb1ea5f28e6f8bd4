"""Run directories to one JSON record: settings, accuracy after each epoch, cost, environment.

python benchmarks/collect_runs.py RUN... --json FILE.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from locallearn.engine import TrainConfig
from locallearn.engine.files import write_json

# Where the files lay is no part of a result.
_PLACES = ("data_dir", "cache")
_RESULTS = (
    "test_acc",
    "best_test_acc",
    "test_acc_per_epoch",
    "step_time_ms_median",
    "num_params",
    "num_additional_params",
    "backend",
    "block_paths",
)


def record(run: Path) -> dict[str, Any]:
    """One run: what differs from the defaults, what it reached, and where it ran."""
    config = json.loads((run / "config.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    rule = config["settings"]["rule"]
    usual = TrainConfig(rule=rule, dataset=config["settings"]["dataset"]).resolve().to_json()
    settings = {
        name: value
        for name, value in config["settings"].items()
        if name in ("rule", "dataset", "model") or (value != usual[name] and name not in _PLACES)
    }
    return {
        "name": run.name,
        "settings": settings,
        "data": {name: config["data"][name] for name in ("num_train", "num_test", "augmentation")},
        "results": {name: summary[name] for name in _RESULTS},
        "environment": config["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", required=True, type=Path)
    arguments = parser.parse_args()
    write_json(arguments.json, {"runs": [record(run) for run in arguments.runs]})


if __name__ == "__main__":
    main()
