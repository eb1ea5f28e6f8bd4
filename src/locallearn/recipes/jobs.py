"""Runs of a table, several at a time, each in a process of its own.

What a run tells (its progress, its epochs, its end) comes to the caller through a pipe; what it
prints goes to a log beside its directory. A run is stopped by SIGTERM and then saves itself; where
its parent was killed, it ends at once, and the same plan resumes it from its last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from locallearn.data import SilentListener, Work
from locallearn.engine import (
    Interrupted,
    LocalLearner,
    Row,
    RunConfig,
    RunDirectory,
    Snapshot,
    TrainConfig,
    Trainer,
)
from locallearn.engine.allocator import keep_freed_memory
from locallearn.errors import UserError
from locallearn.recipes.plan import Cell, CellState

# Between snapshots of a run's progress.
_PROGRESS_SECONDS = 0.5
_POLL_SECONDS = 0.2
_EXIT_CODE_OF_AN_ORPHAN = 3


@dataclass(frozen=True)
class Started:
    """It trains: so many epochs are behind it, of so many."""

    epoch: int
    num_epochs: int


@dataclass(frozen=True)
class Busy:
    """Before it trains, or between: reading data, testing."""

    text: str


@dataclass(frozen=True)
class Noted:
    """What the user should know."""

    text: str


@dataclass(frozen=True)
class EpochDone:
    """An epoch's row of metrics.csv."""

    row: Row
    num_epochs: int


@dataclass(frozen=True)
class Finished:
    """All its results are there."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class Stopped:
    """On request; all is saved, or nothing was there to save."""


@dataclass(frozen=True)
class Failed:
    """message: in one line."""

    message: str


Message = Started | Busy | Noted | Snapshot | EpochDone | Finished | Stopped | Failed
Outcome = Finished | Stopped | Failed


class TableListener(Protocol):
    """Told of the runs of a table. All methods return at once."""

    def on_begin(self, cell: Cell) -> None: ...

    def on_message(self, cell: Cell, message: Message) -> None:
        """Of a run that goes on."""
        ...

    def on_end(self, cell: Cell, outcome: Outcome) -> None: ...

    def on_tick(self) -> None:
        """A few times a second."""
        ...


def run_cells(
    cells: Sequence[Cell],
    *,
    num_jobs: int,
    listener: TableListener,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[Cell, Outcome]:
    """Run what is not done yet, in order, ``num_jobs`` at a time.

    A run that fails does not keep the others from being run.

    Arguments:
        cells: of a plan.
        num_jobs: at most so many processes.
        listener: is told.
        should_stop: asked a few times a second; once it says yes, the runs are told to save
            themselves and nothing more is begun.

    Returns:
        What became of each that was begun.

    Raises:
        UserError: a directory that holds a run with other settings; nothing is begun then.
    """
    waiting = [cell for cell in cells if cell.state() is not CellState.DONE]
    jobs: dict[Connection, _Job] = {}
    outcomes: dict[Cell, Outcome] = {}
    is_stopping = False
    try:
        while jobs or (waiting and not is_stopping):
            while len(jobs) < num_jobs and not is_stopping:
                cell = _next(waiting, jobs.values())
                if cell is None:
                    break
                waiting.remove(cell)
                job = _Job.begin(cell)
                jobs[job.connection] = job
                listener.on_begin(cell)
            # A closed pipe is "ready" too: of a process that has ended, however it did.
            for connection in wait(list(jobs), timeout=_POLL_SECONDS):
                assert isinstance(connection, Connection)
                job = jobs[connection]
                outcome = job.receive(listener)
                if outcome is not None:
                    del jobs[connection]
                    outcomes[job.cell] = outcome
                    listener.on_end(job.cell, outcome)
            listener.on_tick()
            if not is_stopping and should_stop():
                is_stopping = True
                for job in jobs.values():
                    job.process.terminate()
    finally:
        for job in jobs.values():  # only where something was raised above
            job.process.kill()
    return outcomes


def _next(waiting: Iterable[Cell], jobs: Iterable[_Job]) -> Cell | None:
    """The first whose data no other run is just downloading, unpacking or decoding."""
    busy = {job.data for job in jobs if job.is_loading}
    return next((cell for cell in waiting if _data(cell) not in busy), None)


def _data(cell: Cell) -> tuple[str, str | None]:
    return cell.settings.dataset, cell.settings.data_dir


@dataclass
class _Job:
    """A run in its process; ``is_loading`` until it trains."""

    cell: Cell
    process: SpawnProcess
    connection: Connection
    is_loading: bool = True

    @property
    def data(self) -> tuple[str, str | None]:
        return _data(self.cell)

    @classmethod
    def begin(cls, cell: Cell) -> _Job:
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(cell.settings, cell.path, theirs), name=cell.name
        )
        process.start()
        theirs.close()
        return cls(cell, process, ours)

    def receive(self, listener: TableListener) -> Outcome | None:
        """What has come; the outcome once the process has ended."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            if code == -signal.SIGTERM:
                return Stopped()  # before it trained
            return Failed(f"its process ended with {_say_code(code)}; see {log_path(self.cell)}.")
        if isinstance(message, Finished | Stopped | Failed):
            self.process.join()
            self.connection.close()
            return message
        if isinstance(message, Started):
            self.is_loading = False
        listener.on_message(self.cell, message)
        return None


def _say_code(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"


def log_path(cell: Cell) -> Path:
    """What the run's process printed."""
    return _log_path(cell.path)


def _log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.log")


# -- in the run's process -----------------------------------------------------------------------


def _work(settings: TrainConfig, path: Path, connection: Connection) -> None:
    """Start or resume one run, and tell of it."""
    # Ctrl-C reaches every process of the terminal; the parent hears it, and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(_log_path(path), "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    keep_freed_memory()
    message: Message
    try:
        message = _train(settings, path, _Teller(connection))
    except Interrupted:
        message = Stopped()
    except UserError as error:
        message = Failed(str(error))
    except OSError as error:
        message = Failed(f"{error.filename or path}: {error.strerror or error}.")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        connection.send(Failed(f"{type(error).__name__}: {error} (see {_log_path(path)})."))
        raise
    connection.send(message)


def _train(settings: TrainConfig, path: Path, teller: _Teller) -> Message:
    run = RunDirectory(path)
    if run.config_path.exists():
        places = {"data_dir": settings.data_dir, "cache": settings.cache}
        given = {name: place for name, place in places.items() if place is not None}
        trainer = Trainer.resume(path, teller, given)
    else:
        trainer = Trainer.start(settings, path, teller)
    teller.tell(Started(trainer.epoch, trainer.num_epochs))
    signal.signal(signal.SIGTERM, lambda number, frame: trainer.request_stop(number))
    return Finished(trainer.fit())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(_EXIT_CODE_OF_AN_ORPHAN)


class _Teller(SilentListener):
    """A training loop's observer that passes on what it is told."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    def tell(self, message: Message) -> None:
        self._connection.send(message)

    def on_work(self, work: Work) -> None:
        self.tell(Busy(f"{work.verb} {work.what}"))

    def on_start(self, config: RunConfig, learner: LocalLearner, run: RunDirectory) -> None:
        pass

    def on_note(self, text: str) -> None:
        self.tell(Noted(text))

    def wants_progress(self) -> bool:
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return False
        self._last = now
        return True

    def on_progress(self, snapshot: Snapshot) -> None:
        self.tell(snapshot)

    def on_evaluation(self, epoch: int) -> None:
        self.tell(Busy(f"testing after epoch {epoch}"))

    def on_epoch(self, row: Row, num_epochs: int) -> None:
        self.tell(EpochDone(row, num_epochs))
