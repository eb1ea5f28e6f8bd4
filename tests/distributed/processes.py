"""Several processes of one test, joined as `torchrun` would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_TIMEOUT_SECONDS = 240

# One that has torch and the engine loaded, from which the others are forked.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["locallearn.engine"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, num: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def in_processes(num: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``num`` processes, by rank.

    The function is one of a module's, and what it returns can be pickled (tensors as numpy, or
    plain values). An error in one of them fails the test, with its traceback.
    """
    port, results = free_port(), _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, num, port, results, function, arguments))
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    errors: list[str] = []
    try:
        for _ in processes:
            rank, value, error = results.get(timeout=_TIMEOUT_SECONDS)
            found[rank] = value
            if error is not None:
                errors.append(f"rank {rank}:\n{error}")
                break  # the others may wait for it for long
    finally:
        for process in processes:
            process.join(timeout=10 if not errors else 1)
            process.kill()
            process.join()
    assert not errors, errors[0]
    return [found[rank] for rank in range(num)]


def _run(
    rank: int,
    num: int,
    port: int,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    os.environ.update(environment(rank, num, port))
    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
