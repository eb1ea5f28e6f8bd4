"""A rank is killed in a real run of torchrun, by the functions of the benchmark that does so thirty
times."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from locallearn.cli.main import main
from locallearn.engine.run import RunDirectory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = [
    "--width",
    "0.25",
    "--limit-train",
    "128",
    "--limit-test",
    "64",
    "--epochs",
    "1",
    "--quiet",
]
SMALL += ["--num-threads", "1"]


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kills

    yield kills
    for name in ("kills", "same_run"):
        sys.modules.pop(name, None)


def test_a_kill_ends_the_job_by_name_and_the_restart_comes_to_the_same(
    kills: ModuleType, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert main(["train", *kills.SETTINGS, "--quiet", "--out", str(undisturbed)]) == 0
    kill = kills.Kill(0, "layers:2", 1, "killed", 2, 0.0, "restart")
    run = kills.do(kill, tmp_path)
    assert not kill.missed
    kills.compare(kill, run, undisturbed)
    # How long it took is the benchmark's to judge.
    assert [wrong for wrong in kill.wrong if not wrong.startswith("took ")] == []
    assert "rank 1 (stage 1)" in kill.lines[0]
    assert f"torchrun starts all again, from the last checkpoint in {run}." in kill.lines[0]


def test_the_comparison_finds_a_difference(kills: ModuleType, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "other"]
    for seed, run in enumerate(runs):
        assert main(["train", *SMALL, "--seed", str(seed), "--out", str(run)]) == 0
    kill = kills.Kill(0, "layers:2", 1, "killed", 2, 0.0, "resume")
    kills.compare(kill, runs[0], runs[1])
    assert "metrics.csv" in kill.differing
    assert any(where.startswith("final weights") for where in kill.differing)
    assert kill.wrong


def test_kills_are_drawn_by_their_number(kills: ModuleType) -> None:
    layouts = ["layers:2", "layers:2,data:2"]
    drawn = [kills.draw(number, 0, layouts) for number in range(200)]
    assert drawn == [kills.draw(number, 0, layouts) for number in range(200)]
    assert {kill.kind for kill in drawn} == {"killed", "stopped", "torchrun killed"}
    assert {kill.victim for kill in drawn if kill.layout == "layers:2"} == {None, 0, 1}
    for kill in drawn:
        assert not (kill.victim is None and kill.go_on == "restart")  # there is no torchrun left
        assert not ("data" in kill.layout and kill.go_on.startswith("resume with"))


# -- restarts ------------------------------------------------------------------------------------


def test_a_restart_goes_on_with_the_run_in_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *SMALL, "--out", str(tmp_path / "run")]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(command) == 0  # killed before there was a run: it begins
    first = RunDirectory(tmp_path / "run").checkpoint_path.read_bytes()
    RunDirectory(tmp_path / "run").summary_path.unlink()  # killed at the very end
    assert main(command) == 0
    assert RunDirectory(tmp_path / "run").checkpoint_path.read_bytes() == first
    assert main(command) == 0
    assert "is finished" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_without_out_a_restart_could_not_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert main(["train", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "give --out DIRECTORY" in error
    assert error.count("\n") == 1
