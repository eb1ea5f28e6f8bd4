"""`locallearn report` as a user meets it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from locallearn.cli import main

SMALL = ["--epochs", "2", "--limit-train", "128", "--limit-test", "40", "--num-threads", "1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two seeds of lls, and bp."""
    folder = tmp_path_factory.mktemp("trained")
    for rule, seed in (("lls", "0"), ("lls", "1"), ("bp", "0")):
        run = ["--rule", rule, "--seed", seed, "--out", str(folder / f"{rule}-{seed}"), "--quiet"]
        assert main(["train", *SMALL, *run]) == 0
    return folder


def assert_one_line_error(arguments: list[str], capsys) -> str:
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_report_on_runs_that_were_trained(trained, capsys) -> None:
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out == "report on 3 runs written to report.html\n"
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<title>bp, lls on digits, smallconv</title>" in page
    assert "3 runs; 1 group of runs" in page
    summary = json.loads((trained / "bp-0/summary.json").read_text())
    assert f"{summary['test_acc']:.2f}" in page
    for block in ("conv1", "conv2", "conv3", "linear1"):
        assert f">{block}</text>" in page
    assert os.listdir() == ["report.html"]


def test_report_takes_a_title_and_a_place_and_writes_over(trained, capsys) -> None:
    Path("page.html").write_text("old")
    given = [str(trained / "bp-0"), "--out", "page.html", "--title", "A & B"]
    assert main(["report", *given]) == 0
    assert capsys.readouterr().out == "report on 1 run written to page.html\n"
    assert "<h1>A &amp; B</h1>" in Path("page.html").read_text(encoding="utf-8")


def test_report_says_what_is_not_finished(trained, capsys, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((trained / "bp-0/config.json").read_bytes())
    assert main(["report", str(begun), str(trained / "bp-0")]) == 0
    assert capsys.readouterr().out == (
        "report on 2 runs, 1 of them not finished written to report.html\n"
    )


def test_report_notes_what_others_wrote(trained, capsys, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "config.json").write_text("{")
    (tmp_path / "t/run").symlink_to(trained / "bp-0", target_is_directory=True)
    assert main(["report", "t"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "report on 1 run written to report.html\n"
    assert captured.err == (
        "note: t/a/config.json (and 1 more): not written by locallearn, passed over\n"
    )


def test_report_errors(trained, capsys, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = str(trained / "bp-0")
    for arguments, message in (
        (["nothing"], "nothing is no directory"),
        (["empty"], "empty holds no run"),
        ([run, "nothing"], "nothing is no directory"),
        ([run, "--out", "nowhere/a.html"], "there is no directory nowhere"),
        ([run, "--out", "empty"], "--out empty is a directory; give a file"),
        ([], "Missing argument 'RUN...'"),
    ):
        assert message in assert_one_line_error(arguments, capsys), arguments
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"format": "locallearn-run", "format_version": 1}')
    assert re.search(
        r"broken/config\.json is incomplete", assert_one_line_error(["broken"], capsys)
    )
    assert not Path("report.html").exists()
