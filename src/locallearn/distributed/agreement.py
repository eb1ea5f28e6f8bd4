"""What processes must agree on before they train together."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed import Store  # type: ignore[attr-defined]

from locallearn.errors import Silent, UserError

if TYPE_CHECKING:
    from locallearn.distributed.processes import Processes

_LOOK_SECONDS = 0.01
_MOST_LETTERS = 60  # of a value in a message


@contextlib.contextmanager
def together(processes: Processes, what: str) -> Iterator[None]:
    """Within: what one process raises is raised at all, once all have come so far.

    No exchange may lie within. All waiting is watched by the processes' pulse.

    Arguments:
        processes: all.
        what: is being done.

    Raises:
        UserError: at the first process, with what each said.
        Silent: at the others.
        Exception: a bug of ours, where it occurred.
    """
    error: Exception | None = None
    with processes.pulse.busy(what):
        try:
            yield
        except Exception as raised:
            error = raised
    said = _gather(processes, None if error is None else str(error) or type(error).__name__)
    failed = [rank for rank, text in enumerate(said) if text is not None]
    if not failed:
        return
    if isinstance(error, UserError | OSError) or error is None:
        if processes.rank != 0:
            raise Silent(said[failed[0]]) from error
        if error is not None and len({said[rank] for rank in failed}) == 1:
            raise error
        raise UserError(_by_rank(failed, said)) from error
    raise error


def agree(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Compare what must be the same at all processes.

    Arguments:
        processes: all.
        facts: by the name that the user knows them by; values as JSON has them.

    Raises:
        UserError: at the first process; names each that differs, with its values.
        Silent: at the others.
    """
    _compare(_gather(processes, dict(facts)), processes.rank)


def meet(
    store: Store, rank: int, names: Sequence[str], facts: Mapping[str, Any], timeout_seconds: float
) -> None:
    """Wait for all processes to come, and compare what must be the same at all.

    Arguments:
        store: that all reach.
        rank: of this process.
        names: of all ranks.
        facts: see :func:`agree`.
        timeout_seconds: how long to wait.

    Raises:
        UserError: as :func:`agree`; or names the ranks that have not come.
        Silent: where another process says it.
    """
    keys = [f"come/{each}" for each in range(len(names))]
    store.set(keys[rank], json.dumps(dict(facts)))
    deadline = time.monotonic() + timeout_seconds
    missing = list(range(len(names)))
    while missing := [each for each in missing if not store.check([keys[each]])]:
        if time.monotonic() > deadline:
            message = (
                f"{', '.join(names[each] for each in missing)} did not come to the start within "
                f"{timeout_seconds:.0f} s. Start as many processes as torchrun was told, with "
                f"the same command."
            )
            # The lowest of those that are here says it.
            if any(each not in missing for each in range(rank)):
                raise Silent(message)
            raise UserError(message)
        time.sleep(_LOOK_SECONDS)
    _compare([json.loads(content) for content in store.multi_get(keys)], rank)


def _gather(processes: Processes, value: Any) -> list[Any]:
    """What each process gives, by rank."""
    turn = next(processes.turns)
    keys = [f"turn/{turn}/{rank}" for rank in range(processes.num)]
    processes.store.set(keys[processes.rank], json.dumps([socket.gethostname(), value]))
    missing = keys
    with processes.pulse.waiting(None):
        while missing := [key for key in missing if not processes.store.check([key])]:
            time.sleep(_LOOK_SECONDS)
        contents = processes.store.multi_get(keys)
    return [json.loads(content)[1] for content in contents]


def _by_rank(failed: Sequence[int], said: Sequence[str | None]) -> str:
    """Each text once, with the ranks that said it."""
    ranks: dict[str, list[int]] = {}
    for rank in failed:
        ranks.setdefault(said[rank] or "", []).append(rank)
    return "; ".join(f"{_ranks(of_text)}: {text}" for text, of_text in ranks.items())


def _compare(facts: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Raises UserError, or Silent, where not all are as the first."""
    first = facts[0]
    differing: dict[str, list[int]] = {}
    for other, theirs in enumerate(facts):
        names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
        if names:
            words = (
                f"{name} ({_short(theirs.get(name))}, at rank 0 {_short(first.get(name))})"
                for name in names
            )
            differing.setdefault(", ".join(words), []).append(other)
    if not differing:
        return
    message = "; ".join(
        f"{_ranks(ranks)} {'differs' if len(ranks) == 1 else 'differ'} from rank 0 in {words}"
        for words, ranks in differing.items()
    )
    if rank != 0:
        raise Silent(message)
    raise UserError(f"{message}. Start all processes with the same command, versions and data.")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 3] + "..."
