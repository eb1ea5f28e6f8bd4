from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.distributed.processes import in_processes

from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import joined
from locallearn.errors import UserError


def _place(num_stages: int, num_replicas: int) -> tuple[int, int, int, int]:
    with joined(Parallelism(num_stages, num_replicas), "cpu", 30) as processes:
        total = torch.ones(()) * processes.rank
        dist.all_reduce(total, group=processes.replicas)
        assert processes.rank_of(processes.stage, processes.replica) == processes.rank
        return processes.rank, processes.stage, processes.replica, int(total)


def test_ranks_are_a_grid_of_stages_and_replicas() -> None:
    places = in_processes(4, _place, 2, 2)
    assert places == [(0, 0, 0, 1), (1, 0, 1, 1), (2, 1, 0, 5), (3, 1, 1, 5)]


def test_without_torchrun_the_error_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UserError, match="torchrun --nproc-per-node 2"),
        joined(Parallelism(2, 1), "cpu", 30),
    ):
        pass
