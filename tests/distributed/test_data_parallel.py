"""Whole runs of replicas, through the loop that the command line runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.processes import in_processes
from tests.distributed.training import fit, train_alone, train_in_processes
from torch.utils._pytree import tree_leaves

from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import joined
from locallearn.distributed.team import ProcessTeam
from locallearn.engine.run import load_checkpoint

# Of a last batch of two images one of three replicas has none.
SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "model": "smallconv",
    "width": 0.125,
    "limit_train": 50,
    "limit_test": 40,
    "batch_size": 16,
    "test_batch_size": 12,
    "epochs": 2,
    "num_threads": 1,
    "device": "cpu",
}


def _assert_same(one: Path, other: Path) -> None:
    """The same bits of weights, statistics and optimizers."""
    states = [load_checkpoint(out / "checkpoint.pt")["learner"] for out in (one, other)]
    pairs = list(zip(*(tree_leaves(state) for state in states), strict=True))
    assert any(isinstance(a, torch.Tensor) for a, _ in pairs)
    for a, b in pairs:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _train_whole_and_stopped(out: Path, settings: dict[str, Any]) -> None:
    """One run as it is, and one that is asked to stop in its second step, and resumed."""
    with joined(Parallelism(1, 2), "cpu", 120) as processes:
        fit(out / "whole", settings, ProcessTeam(processes))
        fit(out / "stopped", settings | {"stop_after": 2}, ProcessTeam(processes))
        assert not (out / "stopped" / "summary.json").exists()
        fit(out / "stopped", {}, ProcessTeam(processes))


def _metrics(out: Path) -> list[dict[str, float]]:
    with open(out / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_stages_of_replicas_and_resumed_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """Dropout included."""
    settings = SETTINGS | {"rule": "lls-mxm", "dropout": 0.2}
    in_processes(2, _train_whole_and_stopped, tmp_path, settings)
    train_in_processes("layers:2,data:2", 4, tmp_path / "both", balance="2,2", **settings)
    _assert_same(tmp_path / "whole", tmp_path / "both")
    _assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("rule", ["lls", "bp"])
def test_what_a_run_reports_is_of_all_replicas(tmp_path: Path, rule: str) -> None:
    """Without BatchNorm, and so as one process, but for rounding."""
    settings = SETTINGS | {"norm": "none", "rule": rule, "optimizer": "sgd", "epochs": 1}
    train_alone(tmp_path / "alone", **settings)
    train_in_processes("data", 3, tmp_path / "data", **settings)
    for alone, ours in zip(_metrics(tmp_path / "alone"), _metrics(tmp_path / "data"), strict=True):
        assert alone.keys() == ours.keys()
        for name in alone.keys() - {"images_per_second", "step_time_ms"}:
            assert ours[name] == pytest.approx(alone[name], rel=1e-4), name
