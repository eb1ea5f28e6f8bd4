"""Ctrl-C and SIGTERM as requests."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def noting_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Within: SIGINT and SIGTERM call ``note`` with their number; a second one acts as ever."""

    def handle(number: int, frame: FrameType | None) -> None:
        note(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        int(each): signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
