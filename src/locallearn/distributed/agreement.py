"""What processes must agree on before they train together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from locallearn.distributed.processes import Processes
from locallearn.errors import Silent, UserError


@contextlib.contextmanager
def together(processes: Processes, what: str) -> Iterator[None]:
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    said: list[Any] = [None] * processes.num
    dist.all_gather_object(said, None if error is None else str(error), group=processes.control)
    words = {text: rank for rank, text in reversed(list(enumerate(said))) if text is not None}
    if words:
        if processes.rank != 0:
            raise Silent("") from error
        raise UserError("; ".join(f"rank {rank}: {text}" for text, rank in words.items()))


def agree(processes: Processes, facts: dict[str, Any]) -> None:
    said: list[Any] = [None] * processes.num
    dist.all_gather_object(said, facts, group=processes.control)
    with together(processes, "the comparison of settings, versions and data"):
        if processes.rank == 0:
            for rank, other in enumerate(said):
                differing = [name for name in facts if other.get(name) != facts[name]]
                if differing:
                    raise UserError(f"rank {rank} differs from rank 0 in {', '.join(differing)}.")
