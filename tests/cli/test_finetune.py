"""`locallearn finetune` as a user meets it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from locallearn.cli import main
from locallearn.engine import RunDirectory
from locallearn.engine.config import train_command

TUNE = ["--epochs", "1", "--batch-size", "8", "--num-threads", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run on digits, and a folder of images of three of them."""
    place = tmp_path_factory.mktemp("finetune")
    arguments = ["--epochs", "1", "--limit-train", "200", "--limit-test", "20", "--width", "0.25"]
    arguments += ["--num-threads", "1", "--quiet", "--out", str(place / "source")]
    assert main(["train", *arguments]) == 0
    data = load_digits()
    for name, digit, count in (("one", 1, 10), ("two", 2, 6), ("six", 6, 5)):
        folder = place / "data" / name
        folder.mkdir(parents=True)
        for number in np.flatnonzero(data.target == digit)[:count]:
            pixels = (data.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "160")


def test_what_is_printed_and_what_works_on_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--from", "source", "--data-dir", "data", "--memory-limit", "1MiB", *TUNE]
    assert main(["finetune", *arguments, "--out", "tuned"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^from     .*source$", out, re.M)
    assert re.search(
        r"^weights  [\d,]+ numbers loaded; new: classifier.weight, classifier.bias$", out, re.M
    )
    assert re.search(r"^classes  training: 13 images: one 6, six 3, two 4$", out, re.M)
    assert re.search(r"^balance  the largest class has 2.0x the smallest; shown equally", out, re.M)
    assert re.search(r"^limit    1MiB: .* and the output layer learn", out, re.M)
    assert re.search(r"^peak     \d+\.\d MiB measured: ", out, re.M)
    assert len(re.findall(r"^bp       ", out, re.M)) == 2
    assert re.search(r"^test accuracy .* %, balanced accuracy .* % after 1 epochs", out, re.M)
    assert re.search(r"MiB of the 1MiB allowed$", out, re.M)
    assert out.splitlines()[-1] == "next: locallearn predict tuned IMAGE..."

    summary = json.loads(Path("tuned/summary.json").read_text())
    assert summary["peak_memory_mib"] <= 1
    assert main(["evaluate", "tuned", "--json", "e.json"]) == 0
    assert "balanced accuracy" in capsys.readouterr().out
    figures = json.loads(Path("e.json").read_text())
    assert figures["balanced_accuracy"] == pytest.approx(summary["test_balanced_acc"])
    image = next(Path("data/six").iterdir())
    assert main(["predict", "tuned", str(image), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["predictions"][0]["class"] in ("one", "two", "six")
    assert main(["report", "tuned", "source"]) == 0
    page = Path("report.html").read_text()
    assert "locallearn finetune --from" in page
    capsys.readouterr()
    for command in ("finetune", "train"):
        assert main([command, "--resume", "tuned"]) == 0
        assert "is finished" in capsys.readouterr().out


def test_the_recorded_command_makes_the_same_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--from", "source", "--data-dir", "data", "--rule", "lls-mxm:temperature=0.7"]
    given += ["--trained-blocks", "linear1", "--cache", "cache", "--keep", "best", "--quiet"]
    assert main(["finetune", *given, *TUNE, "--out", "first"]) == 0
    settings = RunDirectory(Path("first")).read_config().settings
    program, *words = shlex.split(train_command(settings))
    assert (program, words[0]) == ("locallearn", "finetune")
    assert main([*words, "--out", "second", "--quiet"]) == 0
    assert RunDirectory(Path("second")).read_config().settings == settings
    one, two = (load_file(Path(run, "model.safetensors")) for run in ("first", "second"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(capsys.readouterr().out.splitlines()) == 2 * 4


def test_bad_input_is_one_line(place: Path, error_line: Callable[[list[str]], str]) -> None:
    usual = ["finetune", "--from", "source", "--data-dir", "data"]
    for arguments, said in (
        (["finetune"], "--from is missing"),
        (["finetune", "--from", "nothing"], "no such file or directory"),
        (["finetune", "--from", "source"], "needs --data-dir"),
        ([*usual, "--memory-limit", "much"], "'much' is no amount of memory"),
        ([*usual, "--memory-limit", "1KiB"], "the smallest that can learn"),
        ([*usual, "--balance", "some"], "unknown --balance 'some'"),
        ([*usual, "--keep", "all"], "unknown --keep 'all'"),
        ([*usual, "--trained-blocks", "conv9"], "conv9"),
        ([*usual, "--batch-size", "64"], "more than the 13 training images"),
        ([*usual, "--cache-views", "0"], "--cache-views must be at least 1"),
        ([*usual, "--cache", "c"], "nothing is frozen before 'conv1'"),
        ([*usual, "--out", "source"], "already holds a run"),
        ([*usual, "--resume", "source"], "exclude each other"),
        (["finetune", "--resume", "source"], "is no fine-tuning"),
    ):
        assert said in error_line(arguments), arguments
