"""Runs in processes of their own: told of, stopped, failing, orphaned."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locallearn.analysis.measured import read_peak_mib
from locallearn.cli import main
from locallearn.cli.console import QuietObserver
from locallearn.engine import RunDirectory, Snapshot, Trainer
from locallearn.recipes import (
    Busy,
    Cell,
    CellState,
    Changes,
    EpochDone,
    Failed,
    Finished,
    Message,
    Outcome,
    RecipeTable,
    Started,
    collect,
    make_plan,
    read_table,
    run_cells,
)


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[Cell] = []
        self.messages: dict[Cell, list[Message]] = {}
        self.ended: dict[Cell, Outcome] = {}
        self.num_at_once = 0

    def on_begin(self, cell: Cell) -> None:
        self.begun.append(cell)
        self.messages[cell] = []
        self.num_at_once = max(self.num_at_once, len(self.begun) - len(self.ended))

    def on_message(self, cell: Cell, message: Message) -> None:
        self.messages[cell].append(message)

    def on_end(self, cell: Cell, outcome: Outcome) -> None:
        self.ended[cell] = outcome

    def on_stopping(self) -> None:
        pass

    def on_tick(self) -> None:
        pass


def cells_of(table: RecipeTable, out: Path, **changes) -> list[Cell]:
    return list(make_plan(table, Changes(num_threads=1, **changes), out).cells)


@pytest.mark.usefixtures("quick_runs")
def test_two_at_a_time_one_fails_and_the_others_go_on(table: RecipeTable, tmp_path: Path) -> None:
    lls, bp, *_ = cells_of(table, tmp_path)
    broken = dataclasses.replace(
        bp,
        settings=dataclasses.replace(bp.settings, lr=1e30, optimizer="sgd"),
        path=tmp_path / "broken" / "seed-0",
    )
    listener = Recorder()
    outcomes = run_cells([broken, lls, bp], num_jobs=2, listener=listener)
    assert listener.begun == [broken, lls, bp]
    assert listener.num_at_once == 2
    assert listener.ended == outcomes
    failure = outcomes[broken]
    assert isinstance(failure, Failed)
    assert "became" in failure.message
    assert "Try a smaller --lr" in failure.message
    for cell in (lls, bp):
        outcome = outcomes[cell]
        assert isinstance(outcome, Finished)
        assert cell.state() is CellState.DONE
        assert outcome.summary == RunDirectory(cell.path).read_summary()
        said = listener.messages[cell]
        assert Started(0, 4) in said
        assert [m.row["epoch"] for m in said if isinstance(m, EpochDone)] == [1, 2, 3, 4]
        assert any(isinstance(m, Snapshot) for m in said)
        assert Busy("testing after epoch 4") in said
        assert Busy("measuring the memory of a step") in said
        assert read_peak_mib(cell.path) > 0
    # What is done is not begun again.
    again = Recorder()
    assert run_cells([lls, bp], num_jobs=2, listener=again) == {}
    assert again.begun == []
    # But for its measurement, where that is missing.
    (lls.folder / "step.json").unlink()
    assert run_cells([lls, bp], num_jobs=2, listener=again)[lls] == outcomes[lls]
    assert again.begun == [lls]
    assert again.messages[lls] == [Busy("measuring the memory of a step")]
    assert read_peak_mib(lls.path) > 0


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="finds processes by Linux's /proc"
)


def children(parent: int) -> list[int]:
    """Processes begun by another that train a run (and not multiprocessing's own helper)."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text()
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and "spawn_main" in command:
            found.append(int(path.name))
    return found


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.usefixtures("quick_runs")
def test_a_process_that_dies_is_a_failure_with_its_log(table: RecipeTable, tmp_path: Path) -> None:
    cell = cells_of(table, tmp_path)[0]
    cell = dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=5000))

    class Killer(Recorder):
        def on_message(self, cell: Cell, message: Message) -> None:
            super().on_message(cell, message)
            if isinstance(message, Started):
                (child,) = multiprocessing.active_children()
                child.kill()

    (outcome,) = run_cells([cell], num_jobs=1, listener=Killer()).values()
    assert isinstance(outcome, Failed)
    assert outcome.message.startswith("its process ended with signal 9 (SIGKILL); see ")
    assert "seed-0.log" in outcome.message


@needs_proc
def test_a_killed_table_is_continued_by_the_same_command(
    table_path: Path, tmp_path: Path, quick_runs: None
) -> None:
    """kill -9 in the middle of a run: no process is left, and the table comes out the same."""
    table_path.write_text(table_path.read_text().replace("epochs = 4", "epochs = 8"))
    arguments = ["reproduce", str(table_path), "--seeds", "1", "--only", "digits-lls", "--out"]
    part = read_table(str(table_path)).only(["digits-lls"])
    changes = Changes(num_threads=torch.get_num_threads())
    plans = [make_plan(part, changes, tmp_path / name, seeds=[1]) for name in ("whole", "cut")]
    whole, cut = (RunDirectory(plan.cells[0].path) for plan in plans)
    Trainer.start(plans[0].cells[0].settings, whole.path, QuietObserver()).fit()
    command = [sys.executable, "-m", "locallearn", *arguments, str(tmp_path / "cut")]
    table = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not cut.metrics_path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        (worker,) = children(table.pid)
        os.kill(worker, signal.SIGSTOP)  # so that it can't end before its parent is killed
    finally:
        table.kill()
        table.wait()
    os.kill(worker, signal.SIGCONT)
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(worker)
    assert not cut.is_finished
    assert main([*arguments, str(tmp_path / "cut")]) == 0
    weights = [load_file(run.model_path) for run in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    ((ours,), (theirs,)) = (collect(plan) for plan in plans)
    assert ours.runs[0].test_acc_per_epoch == theirs.runs[0].test_acc_per_epoch
    assert ours.test_acc == theirs.test_acc
    assert ours.runs[0].command == theirs.runs[0].command
    assert ours.cost == theirs.cost
    assert theirs.peak_activation_mib > 0
