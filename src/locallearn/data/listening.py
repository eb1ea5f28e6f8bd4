"""Who is told of the long work before a dataset is there: downloads, unpacking, decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Work:
    """A piece of work that takes long.

    Arguments:
        verb: "downloading", "checking", "unpacking", "reading", "reading the sizes of",
            "decoding".
        what: a file's name, or "60,000 images".
        unit: of ``total`` and of all progress, "bytes" or "images".
        total: how much there is.
        begun: how much of it was there before, where a download goes on.
        origin: where it comes from, a URL.
        target: where the result goes.
    """

    verb: str
    what: str
    unit: str
    total: int
    begun: int = 0
    origin: str | None = None
    target: Path | None = None


class DataListener(Protocol):
    """Told of each piece of work, one after the other. All methods return at once."""

    def on_work(self, work: Work) -> None:
        """It begins."""
        ...

    def on_work_progress(self, done: int) -> None:
        """So much of the total is done; less than before where a download starts over."""
        ...

    def on_work_end(self, error: BaseException | None) -> None:
        """It is over: finished, or broken off by this error (or KeyboardInterrupt)."""
        ...


class SilentListener:
    """Passes nothing on."""

    def on_work(self, work: Work) -> None:
        pass

    def on_work_progress(self, done: int) -> None:
        pass

    def on_work_end(self, error: BaseException | None) -> None:
        pass


SILENT = SilentListener()


@contextlib.contextmanager
def telling(listener: DataListener, work: Work) -> Iterator[Callable[[int], None]]:
    """Within: the work goes on; yields what is to be called with how much is done."""
    listener.on_work(work)
    try:
        yield listener.on_work_progress
    except BaseException as error:
        listener.on_work_end(error)
        raise
    listener.on_work_end(None)


def readable_size(num_bytes: int) -> str:
    """A number of bytes for people: KiB below a MiB, MiB below a GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"
