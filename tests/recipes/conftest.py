"""A small table of digits, and run directories as they are after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.data import InputSpec
from locallearn.engine import RunConfig, RunDirectory
from locallearn.engine.environment import describe_environment
from locallearn.recipes import Cell, RecipeTable, read_table

DIGITS = """
title = "Digits & 100 %"
source = "nobody, 2026"
[defaults]
dataset = "digits"
model = "smallconv"
epochs = 4
seeds = [0, 1]
limit_train = 200
limit_test = 60
[[recipe]]
name = "digits-lls"
rule = "lls"
[[recipe]]
name = "digits-bp"
rule = "bp"
"""


@pytest.fixture
def table_path(tmp_path: Path) -> Path:
    path = tmp_path / "digits.toml"
    path.write_text(DIGITS)
    return path


@pytest.fixture
def table(table_path: Path) -> RecipeTable:
    return read_table(str(table_path))


@pytest.fixture
def put_run() -> Callable[..., RunDirectory]:
    """Puts a run where a cell has it, finished where accuracies are given."""

    def put(cell: Cell, *test_accs: float, step_time_ms: float = 10.0) -> RunDirectory:
        run = RunDirectory(cell.path)
        settings = cell.settings.resolve()
        data = {"fingerprint": "x", "in_memory": True, "num_train": 1, "num_test": 1}
        config = RunConfig(
            settings,
            InputSpec((8, 8), 1, mean=(0.5,), std=(0.5,)),
            tuple("0123456789"),
            data,
            describe_environment("cpu"),
        )
        run.create(config)
        if test_accs:
            run.write_summary(
                {
                    "test_acc": test_accs[-1],
                    "best_test_acc": max(test_accs),
                    "test_acc_per_epoch": list(test_accs),
                    "step_time_ms_median": step_time_ms,
                }
            )
        return run

    return put
