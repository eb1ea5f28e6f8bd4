"""Ctrl-C, SIGTERM and a closed terminal as requests."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def noting_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Within: SIGINT, SIGTERM and SIGHUP call ``note`` with their number; a second acts as ever.

    One that is ignored stays so: SIGHUP under nohup.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {
        int(number): handler
        for number in numbers
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def restore(number: int) -> None:
        signal.signal(number, before[number] or signal.SIG_DFL)

    def handle(number: int, frame: FrameType | None) -> None:
        note(number)
        restore(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in before:
            restore(number)
