from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tests.distributed.training import train_in_processes

from locallearn.distributed.replay import ReplayBuffer
from locallearn.engine.run import RunDirectory


def taken(buffer: ReplayBuffer) -> int | None:
    found = buffer.take()
    return None if found is None else found[1]


def test_what_is_new_comes_first_and_then_the_least_used() -> None:
    buffer = ReplayBuffer(2)
    for batch in range(3):
        buffer.add(torch.empty(0), batch)
    assert [taken(buffer) for _ in range(3)] == [2, 1, 2]  # batch 0 is held no more
    buffer.add(torch.empty(0), 3)
    assert [taken(buffer) for _ in range(4)] == [3, 3, 3, 2]
    assert buffer.num_taken == 7


def test_it_waits_for_the_first_and_uses_one_at_least() -> None:
    buffer = ReplayBuffer(3)
    results: list[int | None] = []
    thread = threading.Thread(target=lambda: results.append(taken(buffer)))
    thread.start()
    buffer.add(torch.empty(0), 7)
    buffer.end()
    thread.join(10)
    assert results == [7]
    assert taken(buffer) is None


def test_the_end_of_nothing_and_the_end_by_an_error() -> None:
    buffer = ReplayBuffer(1)
    buffer.end()
    assert buffer.take() is None
    buffer = ReplayBuffer(1)
    buffer.add(torch.empty(0), 0)
    buffer.end(RuntimeError("connection closed by peer"))
    with pytest.raises(RuntimeError, match="closed by peer"):
        buffer.take()


def test_stages_that_do_not_wait_train_stop_and_go_on(tmp_path: Path) -> None:
    """What they do depends on the moment; that they end together, and what is written, does not."""
    settings = {"dataset": "digits", "limit_train": 96, "limit_test": 50, "batch_size": 16}
    settings |= {"epochs": 2, "num_threads": 1, "width": 0.25}
    out = tmp_path / "run"
    train_in_processes("layers", 3, out, "1,2,1", replay=2, stop_after=4, **settings)
    assert not RunDirectory(out).is_finished
    train_in_processes("layers", 2, out, "1,3", replay=2)
    train = RunDirectory(out).read_metrics()
    assert train.num_epochs == 2
    for name, column in train.columns.items():
        assert None not in column, name
        if name.endswith("_acc"):
            assert all(0 <= value <= 100 for value in column if value is not None), name
    summary = RunDirectory(out).read_summary()
    assert summary is not None
