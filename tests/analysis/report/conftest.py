"""Runs written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from locallearn.data import InputSpec
from locallearn.engine import RunConfig, RunDirectory, TrainConfig

MakeRun = Callable[..., Path]


def run_config(settings: dict[str, Any], **others: Any) -> RunConfig:
    """As `Trainer.start` makes it, of grey images in ten classes: digits' 8x8, or 32x32."""
    own = {"device": settings.pop("device", "cpu"), "backend": settings.pop("backend", "autograd")}
    given = {"device": "cpu", "num_threads": 1, "epochs": 3, **settings}
    side = 8 if given.get("dataset", "digits") == "digits" else 32
    data = {
        "num_train": 1000,
        "num_val": 0,
        "num_test": 200,
        "augmentation": "none",
        "fingerprint": "1-2",
        "in_memory": True,
    }
    environment = {
        "locallearn": "0.1.0",
        "git_commit": "0123456789abcdef+changes",
        "packages": {"torch": "2.15.0"},
        "device": "cpu",
        "device_name": "a processor",
        "created": "2026-11-21T10:03:59+00:00",
    }
    return RunConfig(
        settings=replace(TrainConfig(**given).resolve(), **own),
        inputs=InputSpec((side, side), 1, None, (0.3,), (0.4,)),
        class_names=tuple("0123456789"),
        data=data | others["data"],
        environment=environment | others["environment"],
    )


def rows_of(test_acc: Sequence[float], blocks: Sequence[str] = ()) -> list[dict[str, float]]:
    """A row for each test accuracy; training takes 2 s an epoch."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_acc": value + 1,
            "test_loss": 2.5 / epoch,
            "test_acc": value,
            "images_per_second": 500.0,
            "step_time_ms": 250.0,
            **{f"{block}_acc": value - 10 - i for i, block in enumerate(blocks)},
        }
        for epoch, value in enumerate(test_acc, start=1)
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run directory: finished if it has as many epochs as were planned."""

    def make(
        name: str,
        test_acc: Sequence[float] = (50.0, 60.0, 70.0),
        *,
        blocks: Sequence[str] = (),
        data: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        config = run_config(settings, data=data or {}, environment=environment or {})
        run = RunDirectory(tmp_path / name)
        run.create(config)
        rows = rows_of(test_acc, blocks)
        if rows:
            run.write_metrics(rows)
        if len(rows) == config.settings.epochs:
            run.write_summary({"test_acc": test_acc[-1], "train_acc": test_acc[-1] + 1})
        return run.path

    return make
