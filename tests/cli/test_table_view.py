"""What `locallearn reproduce` shows, from messages made by hand; and signals as requests."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from locallearn.cli import table_view
from locallearn.cli.signals import noting_signals
from locallearn.cli.table_view import TableView, TerminalTableView, say_seconds
from locallearn.engine import Snapshot
from locallearn.recipes import (
    Busy,
    Changes,
    EpochDone,
    Failed,
    Finished,
    Noted,
    Plan,
    Started,
    Stopped,
    make_plan,
    read_table,
)

TABLE = """
title = "Digits"
[defaults]
dataset = "digits"
model = "smallconv"
epochs = 4
seeds = [0, 1]
"""


def plan_of(num_recipes: int, folder: Path, **changes) -> Plan:
    rows = [f'[[recipe]]\nname = "row-{i}"\nrule = "lls"\n' for i in range(num_recipes)]
    path = folder / "digits.toml"
    path.write_text(TABLE + "".join(rows))
    return make_plan(read_table(str(path)), Changes(**changes), folder / "out")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time as the view sees it goes on only when this is called, seconds."""
    now = [0.0]
    monkeypatch.setattr(table_view.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def shown(view: TerminalTableView, width: int = 90, height: int = 30) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    view.console = console
    console.print(view.render())
    text = console.file.getvalue()
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_a_table_as_it_fills(tmp_path: Path, clock: Callable, monkeypatch, capsys) -> None:
    plan = plan_of(2, tmp_path, epochs_scale=0.5)
    view = TerminalTableView(plan, num_jobs=1)
    monkeypatch.setattr(view, "write", list)
    monkeypatch.setattr(view.live, "update", lambda *args, **kwargs: None)
    first, second, third, fourth = plan.cells
    assert "rehearsal: 2 of 4 epochs" in shown(view)
    assert "0 of 4 runs done, 0 s" in shown(view)

    view.on_begin(first)
    view.on_message(first, Started(0, 2))
    view.on_message(first, Snapshot(1, 2, 3, 4, 1.5, 40.0, 1000.0))
    assert re.search(r"^row-0 +38 % +· *$", shown(view), re.M)
    assert "row-0, seed 0: epoch 1/2, loss 1.500, 40.0 % of training images" in shown(view)
    clock(10)
    view.on_message(first, EpochDone({"epoch": 1, "test_acc": 80.0}, 2))
    # One epoch took 10 s; 7 of the 8 of all runs are left.
    assert view.seconds_left() == 70
    assert "0 of 4 runs done, 10 s, about 70 s left" in shown(view)
    view.on_message(first, Busy("testing after epoch 2"))
    assert "row-0, seed 0: testing after epoch 2" in shown(view)
    summary = {"test_acc": 90.0, "best_test_acc": 91.0, "epochs": 2, "step_time_ms_median": 5.0}
    view.on_end(first, Finished(summary))
    assert re.search(r"^row-0 +90\.00 +· +90\.00$", shown(view), re.M)

    view.on_begin(second)
    view.on_end(second, Failed("no such file."))
    assert re.search(r"^row-1 +failed +·$", shown(view), re.M)
    view.on_begin(third)
    view.on_message(third, Started(1, 2))
    view.on_message(third, Noted("goes on"))
    view.on_end(third, Stopped())
    assert re.search(r"^row-0 +90\.00 +paused +90\.00$", shown(view), re.M)
    assert view.seconds_left() == 10 + 20  # half of the third, and the fourth
    view.on_begin(fourth)
    view.on_end(fourth, Finished({**summary, "test_acc": 92.0}))
    assert "2 of 4 runs done, 10 s, 1 failed, about 10 s left" in shown(view)


def test_more_rows_than_the_terminal_has(tmp_path: Path) -> None:
    plan = plan_of(40, tmp_path)
    view = TerminalTableView(plan, num_jobs=1)
    view.on_begin(plan.cells[30])
    text = shown(view, height=20)
    assert len(text.splitlines()) <= 20
    assert "row-30 " in text
    assert re.search(r"^and \d\d more$", text, re.M)


def test_plain_lines(tmp_path: Path, monkeypatch, capsys) -> None:
    plan = plan_of(1, tmp_path)
    view = TableView(plan, num_jobs=1)
    summary = {"test_acc": 90.0, "best_test_acc": 91.0, "epochs": 4, "step_time_ms_median": 5.0}

    def write() -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(view, "write", write)
    view.on_begin(plan.cells[0])
    view.on_message(plan.cells[0], Noted("package versions differ"))
    view.on_end(plan.cells[0], Finished(summary))
    view.on_stopping()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "row-0, seed 0: package versions differ"
    line = "[1/2] row-0, seed 0: 90.00 % (best 91.00 %) after 4 epochs, 5.0 ms a step"
    assert out[1] == line
    assert "can't be written" in out[2]
    assert "No space left" in out[2]
    assert out[3].startswith("stopping: ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7169, "119 min"),
        (7170, "2 h 00 min"),
        (10799, "3 h 00 min"),
        (11100, "3 h 05 min"),
    ],
)
def test_say_seconds(seconds: float, text: str) -> None:
    assert say_seconds(seconds) == text


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_noted_once_and_then_acts_as_before(name: str) -> None:
    number = getattr(signal, name)
    acted: list[int] = []
    before = signal.signal(number, lambda n, frame: acted.append(n))
    heard: list[int] = []
    try:
        with noting_signals(heard.append):
            os.kill(os.getpid(), number)
            assert (heard, acted) == ([number], [])
            os.kill(os.getpid(), number)
            assert (heard, acted) == ([number], [number])
        os.kill(os.getpid(), number)
        assert (heard, acted) == ([number], [number, number])
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard: list[int] = []
    try:
        with noting_signals(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
        assert heard == []
    finally:
        signal.signal(signal.SIGHUP, before)
