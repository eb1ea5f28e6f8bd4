"""`locallearn reproduce` as a user meets it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.cli import main
from locallearn.engine import RunDirectory
from locallearn.engine.run import load_checkpoint
from locallearn.recipes import list_tables

TABLE = """
title = "Digits"
[defaults]
dataset = "digits"
model = "smallconv"
epochs = 4
seeds = [0, 1]
limit_train = 200
limit_test = 60
[[recipe]]
name = "one"
rule = "lls"
[[recipe]]
name = "two"
rule = "drtp"
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(TABLE)


def test_runs_what_is_missing_and_writes_the_table(capfd, quick_runs: None) -> None:
    arguments = ["reproduce", "mine.toml", "--only", "t*", "--epochs-scale", "0.5", "--seeds", "1"]
    assert main([*arguments, "--dry-run"]) == 0
    out = capfd.readouterr().out
    path = Path("runs", "mine", "two", "2-epochs", "seed-1")
    assert f"missing  {path}\n" in out
    assert "locallearn train --dataset digits --model smallconv --rule drtp --epochs 2" in out
    assert "rehearsal: 2 of 4 epochs; 1 of 2 seeds: 1\n" in out
    assert "1 run: 1 missing, 0 started, 0 done" in out
    assert not Path("runs").exists()

    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    mark = "A rehearsal, not the recipes as they are written: 2 of 4 epochs; 1 of 2 seeds: 1."
    assert f"\n{mark}\n" in captured.out
    accuracy = RunDirectory(path).read_summary()["test_acc"]
    assert f"[1/1] two, seed 1: {accuracy:.2f} % (best " in captured.out
    assert re.search(rf"^two +{accuracy:.2f} +\d+\.\d+ +1 ", captured.out, re.M)
    markdown = Path("runs", "mine", "mine-rehearsal.md").read_text()
    assert f"| {accuracy:.2f} |" in markdown
    assert f"**{mark}**" in markdown
    assert "**A part: 1 of the table's 2 rows.**" in markdown

    # The same command again has nothing to do.
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    assert main(arguments) == 0
    assert "seed 1:" not in capfd.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    assert before == after


@pytest.mark.parametrize("table", list_tables())
def test_every_table_can_be_planned(table: str, capsys) -> None:
    mapped = {"table1": "cifar10", "table2": "cifar10", "table3": "tiny-imagenet"}[table]
    place = f"{mapped}=folder:images"
    assert main(["reproduce", table, "--dry-run", "--dataset-map", place, "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "--dataset folder" in out
    assert "--data-dir images" in out
    assert re.search(r"^(\d+) runs: \1 missing, 0 started, 0 done", out, re.M)
    assert f"rehearsal: folder for {mapped}, normalised and augmented as folder is (" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "unknown table 'table9'. Did you mean"),
        (["mine.toml", "--only", "three"], "unknown recipe of mine 'three'"),
        (["mine.toml", "--only", ","], "--only is empty"),
        (["mine.toml", "--seeds", "a"], "--seeds 'a' is no list of seeds"),
        (["mine.toml", "--seeds", "3-1"], "3-1 is empty"),
        (["mine.toml", "--seeds", "0-5000"], "0-5000 is more than 1000 seeds"),
        (["mine.toml", "--limit-train", "0"], "--limit-train"),
        (["mine.toml", "--epochs-scale", "2"], "--epochs-scale must be above 0"),
        (["mine.toml", "--jobs", "0"], "--jobs"),
        (["mine.toml", "--out", ""], "--out is empty"),
        (["mine.toml", "--out", "mine.toml"], "--out mine.toml is a file"),
        (["mine.toml", "--precision", "fp8"], "recipe one: unknown precision 'fp8'"),
        (["mine.toml", "--dataset-map", "digits"], "expected NAME=DATASET"),
        (["mine.toml", "--dataset-map", "digits=folder"], "folder needs a directory"),
        (["mine.toml", "--dataset-map", "digits=mnits"], "unknown dataset 'mnits'"),
        (["mine.toml", "--dataset-map", "dig=mnist"], "unknown dataset 'dig'"),
        (["mine.toml", "--dataset-map", "mnist=cifar10"], "no recipe of the table uses it"),
        (
            ["mine.toml", "--dataset-map", "digits=mnist", "--dataset-map", "digits=mnist"],
            "digits is mapped twice",
        ),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, error_line: Callable[[list[str]], str]
) -> None:
    assert message in error_line(["reproduce", *arguments])
    assert not Path("runs").exists()


def test_a_run_that_fails_is_said_and_the_table_written(capfd, quick_runs: None) -> None:
    Path("empty").mkdir()
    place = ["--dataset-map", "digits=folder:empty"]
    assert main(["reproduce", "mine.toml", "--only", "one", "--seeds", "0", *place]) == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("Error: one, seed 0: ")
    assert "empty" in line
    assert "| 0 of 1 |" in Path("runs", "mine", "mine-rehearsal.md").read_text()


def test_a_directory_that_is_being_filled_is_left_alone(
    error_line: Callable[[list[str]], str],
) -> None:
    fcntl = pytest.importorskip("fcntl")
    Path("out").mkdir()
    with open("out/.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = error_line(["reproduce", "mine.toml", "--out", "out"])
    assert "--out out is being filled by another process. Wait for it to end." in line


@pytest.mark.parametrize("delay", ["at once", "after an epoch"])
def test_ctrl_c_saves_and_the_same_command_goes_on(delay: str) -> None:
    """To the whole process group, as a terminal sends it; also while a run is just starting."""
    Path("mine.toml").write_text(TABLE.replace("epochs = 4", "epochs = 5000"))
    command = [sys.executable, "-m", "locallearn", "reproduce", "mine.toml", "--only", "one"]
    table = subprocess.Popen(
        [*command, "--seeds", "0,1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = Path("runs", "mine", "one", "5000-epochs")
    sign = folder if delay == "at once" else folder / "seed-0" / "metrics.csv"
    deadline = time.monotonic() + 120
    try:
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(table.pid, signal.SIGINT)
        out, err = table.communicate(timeout=120)
    finally:
        table.kill()  # where it has not ended; its runs end with it
    assert table.returncode == 130, err
    assert err == "Stopped; all is saved. The same command goes on from here.\n"
    assert "stopping: the runs save themselves" in out
    assert "one, seed 0: stopped" in out
    assert "Traceback" not in out
    assert not (folder / "seed-1").exists()
    if delay == "after an epoch":
        assert load_checkpoint(folder / "seed-0" / "checkpoint.pt")["epoch"] >= 1
