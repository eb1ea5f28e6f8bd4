"""`evaluate --early-exit`, and `predict --exit-threshold`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.cli import main

TRAIN = ["train", "--epochs", "2", "--limit-train", "200", "--limit-test", "60", "--quiet"]
NAMES = ["conv1", "conv2", "conv3", "linear1", "output"]


@pytest.fixture(autouse=True)
def _timed_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locallearn.cli.exits._PASS_MS", 1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with and without images held out, and one of bp."""
    root = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--val-split", "0.2", "--out", str(root / "held")]) == 0
    assert main([*TRAIN, "--out", str(root / "plain")]) == 0
    assert main([*TRAIN, "--rule", "bp", "--out", str(root / "bp")]) == 0
    return root


def test_it_says_what_exits_save(runs: Path, tmp_path: Path, capsys) -> None:
    run, plot, figures = runs / "held", tmp_path / "exits.png", tmp_path / "exits.json"
    written = ["--plot", str(plot), "--json", str(figures)]
    assert main(["evaluate", str(run), "--early-exit", *written]) == 0
    said = capsys.readouterr().out
    assert "60 test images; calibrated on 40 validation images" in said
    assert "the straight line between its ends" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assert [row["name"] for row in found["exits"]] == NAMES
    assert found["points"][0]["shares"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [timing["batch_size"] for timing in found["timings"]] == [60, 1]
    record = json.loads((run / "exits.json").read_text())
    assert list(record["temperatures"]) == NAMES


def test_a_run_that_held_nothing_out(runs: Path, capsys) -> None:
    assert main(["evaluate", str(runs / "plain"), "--early-exit", "--exit-threshold", "0.6"]) == 0
    said = capsys.readouterr().out
    assert "50 test images; calibrated on 10 other test images" in said
    assert "threshold 0.600, as asked" in said


def test_chosen_exits(runs: Path, capsys) -> None:
    assert main(["evaluate", str(runs / "held"), "--early-exit", "--exits", "conv2, linear1"]) == 0
    record = json.loads((runs / "held" / "exits.json").read_text())
    assert list(record["temperatures"]) == ["conv2", "linear1", "output"]


def test_predict_by_the_chosen_threshold(
    runs: Path, make_folder, capsys, error_line: Callable[[list[str]], str]
) -> None:
    run = runs / "plain"
    image = str(next(make_folder(sizes=((8, 8),), per_class=1, mode="L").rglob("*.png")))
    (run / "exits.json").unlink(missing_ok=True)
    assert "no threshold was chosen" in error_line(
        ["predict", str(run), image, "--exit-threshold", "auto"]
    )
    assert main(["evaluate", str(run), "--early-exit", "--exit-threshold", "0"]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), image, "--exit-threshold", "auto", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["exit"] == "conv1"  # at threshold 0 the first is always sure enough
    assert main(["predict", str(run), image, "--exit-threshold", "1"]) == 0
    assert "output" in capsys.readouterr().out
    assert main(["predict", str(run), image]) == 0
    assert "left at" not in capsys.readouterr().out
    # Of other weights it is not taken.
    record = json.loads((run / "exits.json").read_text())
    (run / "exits.json").write_text(json.dumps(record | {"weights": "0"}))
    assert "no threshold was chosen" in error_line(
        ["predict", str(run), image, "--exit-threshold", "auto"]
    )
    (run / "exits.json").write_text("{")
    assert "is no valid JSON" in error_line(
        ["predict", str(run), image, "--exit-threshold", "auto"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit-threshold", "0.5"], "are for --early-exit"),
        (["--early-exit", "--exit-threshold", "2"], "must be in [0, 1], got 2"),
        (["--early-exit", "--max-drop", "-1"], "--max-drop must be at least 0"),
        (["--early-exit", "--split", "train"], "leave out --split"),
        (["--early-exit", "--exits", "conv7"], "'conv7' is no block with a head"),
        (["--early-exit", "--exits", ","], "name at least one"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, runs: Path, error_line: Callable[[list[str]], str]
) -> None:
    assert message in error_line(["evaluate", str(runs / "held"), *arguments])


def test_bp_has_no_exits(runs: Path, error_line: Callable[[list[str]], str]) -> None:
    assert "no local losses" in error_line(["evaluate", str(runs / "bp"), "--early-exit"])
    assert not (runs / "bp" / "exits.json").exists()
