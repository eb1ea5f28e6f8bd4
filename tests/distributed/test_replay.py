from __future__ import annotations

import threading

import pytest
import torch

from locallearn.distributed.replay import ReplayBuffer


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
    assert (buffer.num_taken, buffer.num_repeated) == (7, 4)


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
