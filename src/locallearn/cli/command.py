"""The command line that is running, for the records that its subcommands write."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_GIVEN: ContextVar[tuple[str, ...]] = ContextVar("given", default=())


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Within: these are the program's arguments, without its name."""
    token = _GIVEN.set(tuple(arguments))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def running_command() -> str:
    """What to type into a shell to run it again."""
    return shlex.join(["locallearn", *_GIVEN.get()])
