from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.processes import environment, in_processes

from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import REPLICAS, STAGES, joined
from locallearn.errors import Silent, UserError


def _place(num_stages: int, num_replicas: int) -> tuple[int, int, int, int]:
    with joined(Parallelism(num_stages, num_replicas), "cpu", 30) as processes:
        total = torch.ones(()) * processes.rank
        dist.all_reduce(total, group=processes.replicas)
        for group in (processes.mesh.get_group(STAGES), processes.replicas):
            backend: Any = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=30)
        assert dist.get_process_group_ranks(processes.mesh[STAGES].get_group()) == [
            processes.rank_of(stage, processes.replica) for stage in range(num_stages)
        ]
        assert processes.mesh[REPLICAS].get_local_rank() == processes.replica
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


def test_of_those_without_a_device_of_their_own_one_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, kind in ((2, UserError), (3, Silent), (4, Silent)):
        for name, value in environment(rank, 5, 1).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(UserError, match=f"^process {rank} of this host has no CUDA") as caught,
            joined(Parallelism(5, 1), "cuda", 30),
        ):
            pass
        assert caught.type is kind
