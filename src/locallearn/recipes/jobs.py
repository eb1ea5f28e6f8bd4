"""Runs of a table, several at a time, each in a process of its own.

What a run tells (its progress, its epochs, its end) comes through a pipe; what it prints goes to a
log beside its directory. A run is stopped by SIGTERM and then saves itself; where its parent was
killed, it ends at once, and the same plan resumes it from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from locallearn.analysis.measured import read_peak_mib
from locallearn.recipes.messages import Failed, Finished, Message, Outcome, Started, Stopped
from locallearn.recipes.plan import Cell, CellState
from locallearn.recipes.worker import OF_THE_TERMINAL, log_path, work

_POLL_SECONDS = 0.2
# For a run to save itself where the caller's own failure ends it: a step, and its checkpoint.
_SAVING_SECONDS = 60
# For a process to end that has told its last.
_ENDING_SECONDS = 30


class TableListener(Protocol):
    """Told of the runs of a table. All methods return at once."""

    def on_begin(self, cell: Cell) -> None: ...

    def on_message(self, cell: Cell, message: Message) -> None:
        """Of a run that goes on."""
        ...

    def on_end(self, cell: Cell, outcome: Outcome) -> None: ...

    def on_stopping(self) -> None:
        """The runs that go on are told to save themselves."""
        ...

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

    A run that fails does not keep the others from being run. A finished run is begun once more
    where its recipe's step was not measured yet, and only for that.

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
    waiting = _to_run(cells)
    jobs: dict[Connection, _Job] = {}
    outcomes: dict[Cell, Outcome] = {}
    is_stopping = False
    with _ending(jobs):
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
                listener.on_stopping()
    return outcomes


def _to_run(cells: Sequence[Cell]) -> list[Cell]:
    """Those that are not done, and of recipes without a measured step one that is."""
    chosen, measured = [], set()
    for cell in cells:
        if cell.state() is not CellState.DONE:
            chosen.append(cell)
        elif cell.folder not in measured and read_peak_mib(cell.path) is None:
            measured.add(cell.folder)
            chosen.append(cell)
    return chosen


def _next(waiting: Iterable[Cell], jobs: Iterable[_Job]) -> Cell | None:
    """The first whose data no other run is just downloading, unpacking or decoding."""
    busy = {_data(job.cell) for job in jobs if job.is_loading}
    return next((cell for cell in waiting if _data(cell) not in busy), None)


def _data(cell: Cell) -> tuple[str, str | None]:
    return cell.settings.dataset, cell.settings.data_dir


@contextlib.contextmanager
def _ending(jobs: dict[Connection, _Job]) -> Iterator[None]:
    """Within: what is raised ends the runs that go on: they save themselves, but for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        for job in jobs.values():
            job.process.kill()
        raise
    except BaseException:
        for job in jobs.values():
            job.process.terminate()
        for job in jobs.values():
            job.end(_SAVING_SECONDS)
        raise


@dataclass
class _Job:
    """A run in its process; ``is_loading`` until it trains."""

    cell: Cell
    process: SpawnProcess
    connection: Connection
    is_loading: bool = True

    @classmethod
    def begin(cls, cell: Cell) -> _Job:
        cell.folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(cell.settings, cell.path, theirs), name=cell.name
        )
        with _held_back(OF_THE_TERMINAL):
            process.start()
        theirs.close()
        return cls(cell, process, ours)

    def receive(self, listener: TableListener) -> Outcome | None:
        """What has come; the outcome once the process has ended."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self.end(_ENDING_SECONDS)
            code = self.process.exitcode
            if code is not None and -code in (signal.SIGTERM, *OF_THE_TERMINAL):
                return Stopped()  # before it trained
            return Failed(
                f"its process ended with {_say_code(code)}; see {log_path(self.cell.path)}."
            )
        if isinstance(message, Finished | Stopped | Failed):
            self.end(_ENDING_SECONDS)
            return message
        if isinstance(message, Started):
            self.is_loading = False
        listener.on_message(self.cell, message)
        return None

    def end(self, seconds: float) -> None:
        """Wait for the process to end, and kill it where it does not."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _held_back(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Within: signals wait. A process begun here does not get them either, until it asks."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which lets signals in again as it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say_code(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"
