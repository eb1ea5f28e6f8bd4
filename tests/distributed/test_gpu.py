"""The same over NCCL: needs a CUDA device for each process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.same_run import differences
from tests.distributed.training import train_alone, train_in_processes

NUM_DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_DEVICES < 2, reason=f"needs two CUDA devices, found {NUM_DEVICES}"),
]

# A captured graph draws its random numbers otherwise, and stages are not captured.
SETTINGS = {
    "dataset": "digits",
    "limit_train": 320,
    "limit_test": 100,
    "batch_size": 64,
    "epochs": 2,
    "dropout": 0.2,
    "augment": "standard",
    "device": "cuda",
    "cuda_graph": False,
}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in those that it starts: cuDNN's choice by time may differ."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("rule", ["lls", "lls-mxm", "local-losses"])
@pytest.mark.parametrize("num", range(2, min(NUM_DEVICES, 4) + 1))
def test_the_bits_are_those_of_one_device(tmp_path: Path, rule: str, num: int) -> None:
    train_alone(tmp_path / "alone", rule=rule, **SETTINGS)
    train_in_processes("layers", num, tmp_path / "run", rule=rule, **SETTINGS)
    assert differences(tmp_path / "alone", tmp_path / "run") == []


def test_replicas_and_stages_give_the_bits_of_replicas(tmp_path: Path) -> None:
    if NUM_DEVICES < 4:
        pytest.skip(f"needs four CUDA devices, found {NUM_DEVICES}")
    train_in_processes("data:2", 2, tmp_path / "data", **SETTINGS)
    train_in_processes("layers:2,data:2", 4, tmp_path / "both", **SETTINGS)
    assert differences(tmp_path / "data", tmp_path / "both") == []
