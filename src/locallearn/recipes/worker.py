"""A run of a table in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

from locallearn.analysis.measured import read_peak_mib
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
from locallearn.recipes.messages import (
    Busy,
    EpochDone,
    Failed,
    Finished,
    Message,
    Noted,
    Outcome,
    Started,
    Stopped,
)
from locallearn.recipes.step_memory import measure_peak

# Between snapshots of a run's progress.
_PROGRESS_SECONDS = 0.5
_EXIT_CODE_OF_AN_ORPHAN = 3

# What reaches every process of a terminal; the parent hears it, and sends SIGTERM.
OF_THE_TERMINAL = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)
)


def log_path(run: Path) -> Path:
    """Where what the process of a run printed lies."""
    return run.with_name(f"{run.name}.log")


def work(settings: TrainConfig, path: Path, connection: Connection) -> None:
    """Start or resume a run, measure its step where nobody has yet, and tell of it all."""
    for number in OF_THE_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log_path(path), "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    keep_freed_memory()
    connection.send(_outcome(settings, path, _Teller(connection)))


def _outcome(settings: TrainConfig, path: Path, teller: _Teller) -> Outcome:
    try:
        summary = RunDirectory(path).read_summary() or _train(settings, path, teller)
        _measure(path, teller)
    except Interrupted:
        return Stopped()
    except UserError as error:
        traceback.print_exc()
        return Failed(_one_line(str(error)))
    except OSError as error:
        traceback.print_exc()
        return Failed(_one_line(f"{error.filename or path}: {error.strerror or error}."))
    except Exception as error:  # the other runs go on, and the user is told
        traceback.print_exc()
        return Failed(_one_line(f"{type(error).__name__}: {error} (see {log_path(path)})."))
    return Finished(summary)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _train(settings: TrainConfig, path: Path, teller: _Teller) -> dict[str, object]:
    if RunDirectory(path).config_path.exists():
        places = {"data_dir": settings.data_dir, "cache": settings.cache}
        given = {name: place for name, place in places.items() if place is not None}
        trainer = Trainer.resume(path, teller, given)
        threads = trainer.settings.num_threads
        if settings.num_threads not in (None, threads):
            teller.on_note(f"goes on with the {threads} CPU threads it was started with")
    else:
        trainer = Trainer.start(settings, path, teller)
    teller.tell(Started(trainer.epoch, trainer.num_epochs))
    signal.signal(signal.SIGTERM, lambda number, frame: trainer.request_stop(number))
    summary = trainer.fit()
    # From here on there is nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return summary


def _measure(path: Path, teller: _Teller) -> None:
    if read_peak_mib(path) is not None:
        return
    teller.tell(Busy("measuring the memory of a step"))
    try:
        measure_peak(path, RunDirectory(path).read_config())
    except (UserError, RuntimeError) as error:  # torch's own for a device or its memory
        traceback.print_exc()
        teller.on_note(f"the memory of a step was not measured: {_one_line(str(error))}")


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
