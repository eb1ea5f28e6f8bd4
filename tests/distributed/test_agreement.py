from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tests.distributed.processes import in_processes

from locallearn.distributed.agreement import agree, meet, together
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import Processes, joined
from locallearn.errors import Silent, UserError

Said = tuple[str, str] | None


def _caught(body: Callable[[], None]) -> Said:
    """What the body raises in one of the processes: its kind and its text."""
    try:
        body()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _raise_by_rank(cases: list[dict[int, Exception]]) -> list[Said]:
    with joined(Parallelism(3, 1), "cpu", 60) as processes:

        def body(errors: Mapping[int, Exception]) -> None:
            with together(processes, "the check"):
                if processes.rank in errors:
                    raise errors[processes.rank]

        return [_caught(functools.partial(body, errors)) for errors in cases]


def test_what_one_raises_all_raise_and_the_first_says() -> None:
    no = UserError("no.")
    cases: list[tuple[dict[int, Exception], str | None]] = [
        ({}, None),
        ({0: no, 1: no, 2: no}, "no."),
        ({0: UserError("the run exists.")}, "the run exists."),
        ({2: UserError("no data.")}, "rank 2: no data."),
        ({0: UserError("full."), 1: no, 2: no}, "rank 0: full.; ranks 1, 2: no."),
        ({1: KeyError("a bug of ours")}, "rank 1: 'a bug of ours'"),
    ]
    by_rank = in_processes(3, _raise_by_rank, [errors for errors, _ in cases])
    for found, (errors, expected) in zip(zip(*by_rank, strict=True), cases, strict=True):
        if expected is None:
            assert found == (None, None, None)
            continue
        assert found[0] == ("UserError", expected)
        for rank in (1, 2):  # a bug is raised where it is
            is_bug = isinstance(errors.get(rank), KeyError)
            assert found[rank][0] == ("KeyError" if is_bug else "Silent")


def _agree_twice() -> tuple[Said, Said]:
    def agreeing(processes: Processes) -> None:
        agree(processes, {"--lr": 0.1, "torch": "2.15.0", "the classes": ["a", "b"]})

    def differing(processes: Processes) -> None:
        facts: dict[str, Any] = {"--lr": 0.005, "torch": "2.15.0", "the data": "f0", "--seed": 1}
        if processes.rank == 1:
            facts |= {"--lr": 0.1, "torch": "2.11.0"}
        if processes.rank == 2:
            facts["the data"] = "9" * 80
            del facts["--seed"]
        agree(processes, facts)

    with joined(Parallelism(3, 1), "cpu", 60) as processes:
        return _caught(lambda: agreeing(processes)), _caught(lambda: differing(processes))


def test_what_differs_is_named_with_its_values() -> None:
    found = in_processes(3, _agree_twice)
    assert [agreed for agreed, _ in found] == [None] * 3
    assert found[0][1] == (
        "UserError",
        "rank 1 differs from rank 0 in --lr (0.1, at rank 0 0.005), torch (2.11.0, at rank 0 "
        "2.15.0); rank 2 differs from rank 0 in the data (" + "9" * 57 + "..., at rank 0 f0), "
        "--seed (none, at rank 0 1). Start all processes with the same command, versions and data.",
    )
    assert [found[rank][1][0] for rank in (1, 2)] == ["Silent", "Silent"]


# -- the start, before there are groups ----------------------------------------------------------

NAMES = ["rank 0", "rank 1 (stage 1)", "rank 2"]


def _meeting(ranks: list[int], facts: Callable[[int], dict[str, Any]]) -> dict[int, UserError]:
    """What each of these ranks, threads here, raises where they are to meet."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    raised: dict[int, UserError] = {}

    def come(rank: int) -> None:
        try:
            meet(store, rank, NAMES, facts(rank), timeout_seconds=0.3)
        except UserError as error:
            raised[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return raised


def test_all_meet() -> None:
    assert _meeting([2, 0, 1], lambda rank: {"--parallel": "layers:3"}) == {}


def test_who_does_not_come_is_named_by_the_first_that_did() -> None:
    raised = _meeting([1, 2], lambda rank: {})
    assert "rank 0 did not come to the start within 0 s" in str(raised[1])
    assert not isinstance(raised[1], Silent)
    assert isinstance(raised[2], Silent)
    raised = _meeting([0], lambda rank: {})
    assert "rank 1 (stage 1), rank 2 did not come to the start" in str(raised[0])


def test_another_layout_is_refused_at_the_start() -> None:
    raised = _meeting([0, 1, 2], lambda rank: {"--parallel": "layers" if rank < 2 else "data"})
    expected = "rank 2 differs from rank 0 in --parallel (data, at rank 0 layers)"
    assert str(raised[0]).startswith(expected)
    assert {type(error) for rank, error in raised.items() if rank} == {Silent}
