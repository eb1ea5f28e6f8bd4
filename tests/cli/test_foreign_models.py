"""Models from elsewhere on the command line: every command works, or says in a line why not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn.cli import main

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width=8):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.mixing = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.mixing.weight
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.second(self.first(x)).relu().mean(dim=(2, 3))
        return self.classifier(self.tied(self.mixing(x).relu()))
"""
MODEL = ["--model", "nets/net.py:Net:width=12", "--blocks", "first,second"]
SMALL = ["--epochs", "1", "--limit-train", "300", "--limit-test", "60", "--num-threads", "1"]

ErrorLine = Callable[[list[str]], str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nets/net.py, and run/, which was trained from there."""
    root = tmp_path_factory.mktemp("made")
    (root / "nets").mkdir()
    (root / "nets" / "net.py").write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", *MODEL, *SMALL, "--quiet", "--out", "run"]) == 0
    return root


@pytest.fixture(autouse=True)
def _beside_the_run(made: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def changed(made: Path) -> Path:
    """The model's file, which differs from what it was, and is put back afterwards."""
    path = made / "nets" / "net.py"
    path.write_text(FILE + "# edited\n")
    yield path
    path.write_text(FILE)


def test_a_run_knows_its_model(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    assert main(["train", *MODEL, *SMALL]) == 0
    out = capsys.readouterr().out
    # Convolutions 120 and 1308, BatchNorm 24, linear layers 156, 12 (tied) and 130.
    assert f"model    {made}/nets/net.py:Net:width=12: 1,750 parameters\n" in out
    assert "autograd in each block (auto: " in out
    (path,) = Path("runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-digits-net.py-Net-width-12-lls", path.name)
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert settings["model"] == f"{made}/nets/net.py:Net:width=12"
    assert settings["blocks"] == "first,second"
    assert json.loads(Path("run/summary.json").read_text())["num_params"] == 1750
    shutil.rmtree("runs")


def test_a_run_is_evaluated_from_anywhere(
    capsys: pytest.CaptureFixture[str], made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = json.loads((made / "run" / "summary.json").read_text())
    for weights in ("run", "run/checkpoint.pt"):
        assert main(["evaluate", str(made / weights)]) == 0
        captured = capsys.readouterr()
        assert f"accuracy {summary['test_acc']:.2f} %" in captured.out
        assert captured.err == ""
    Image.fromarray(np.zeros((9, 11), dtype=np.uint8)).save("image.png")
    assert main(["predict", str(made / "run"), "image.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == "image.png"


def test_a_run_that_was_stopped_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree("run", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    resume = ["train", "--resume", str(tmp_path / "cut")]
    assert main([*resume, *MODEL]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert main(resume) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_file_that_has_changed(
    capsys: pytest.CaptureFixture[str], changed: Path, error_line: ErrorLine, tmp_path: Path
) -> None:
    assert main(["evaluate", "run"]) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: the file of model {changed}:Net:width=12 has changed since the")
    shutil.copytree("run", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    line = error_line(["train", "--resume", str(tmp_path / "cut")])
    assert re.search(r"has changed since the run was started \(sha256 \w{12}, was \w{12}\)", line)
    assert "Restore the file, or start a new run with --out" in line


def test_a_file_that_is_gone(changed: Path, error_line: ErrorLine, tmp_path: Path) -> None:
    changed.unlink()
    line = error_line(["evaluate", "run"])
    assert f"there is no file {changed}, which builds the model 'Net'" in line
    assert f"there is no file {changed}" in error_line(["train", *MODEL])
    page = tmp_path / "report.html"
    assert main(["report", "run", "--out", str(page)]) == 0
    assert "net.py:Net:width=12" in page.read_text()


def test_the_file_is_looked_for_before_the_data(error_line: ErrorLine) -> None:
    arguments = ["train", "--dataset", "folder", "--data-dir", "nowhere"]
    assert "unknown torchvision model" in error_line([*arguments, "--model", "torchvision:resnt"])


def test_analyses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = ["--out", str(tmp_path)]
    assert main(["analyze", "layers", "run", *out]) == 0
    numbers = json.loads((tmp_path / "layers.json").read_text())["numbers"]
    assert list(numbers["test_acc_by_block"]) == ["first", "second"]
    summary = json.loads(Path("run/summary.json").read_text())
    assert numbers["test_acc"] == pytest.approx(summary["test_acc"])
    assert "(net.py:Net:width=12, lls, digits)" in capsys.readouterr().out
    assert main(["analyze", "synchrony", "run", "--images", "all", *out]) == 0
    blocks = json.loads((tmp_path / "synchrony-second-all.json").read_text())["numbers"]["blocks"]
    assert [block["latent_length"] for block in blocks] == [192, 192]
    assert all(block["before_training"]["index"]["value"] > 0 for block in blocks)
    pytest.importorskip("captum")
    assert main(["analyze", "gradcam", "run", "--check", "5", *out]) == 0
    assert (tmp_path / "gradcam-second.png").exists()


def test_analyses_of_a_rule_without_blocks(error_line: ErrorLine, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bp = str(tmp_path / "bp")
    assert main(["train", *MODEL, *SMALL, "--rule", "bp", "--quiet", "--out", bp]) == 0
    line = error_line(["analyze", "synchrony", bp, "--basis", "cosine"])
    assert "Net is a network of another make, in which rule 'bp' knows no blocks to look at" in line
    pytest.importorskip("captum")
    line = error_line(["analyze", "gradcam", bp, "--block", "mixing"])
    assert "no convolutional block 'mixing'. They are, in order: first, first.0, second," in line
    assert main(["analyze", "gradcam", bp, "--check", "5"]) == 0
    assert (tmp_path / "bp" / "figures" / "gradcam-second.0.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--model", "nets/net.py:Net"], "cost counts the layers of the package's own net"),
        (["bench", "--model", "nets/net.py:Net", "--ops"], "--ops times the ops of the package's"),
        (["bench", "--model", "nets/net.py:Net:depth=3"], "has no option 'depth'; it has: width"),
        (
            ["train", "--model", "nets/net.py:Net", "--width", "2"],
            "--width is of the package's",
        ),
        (["train", *MODEL, "--blocks", ""], "--blocks is empty"),
        (["list", "models", "vg?"], "none of the models is called vg?"),
        (["list", "models", "torchvision:vg?"], "no model is called torchvision:vg?"),
        (["list", "models", "hub:*"], "models of 'hub' can't be listed"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, error_line: ErrorLine, made: Path
) -> None:
    before = sorted(path.name for path in made.iterdir())
    assert message in error_line(arguments)
    assert sorted(path.name for path in made.iterdir()) == before


def test_chosen_blocks_of_one_of_our_own_networks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run = str(tmp_path / "run")
    blocks = ["--norm", "none", "--blocks", "conv1.conv,conv2"]
    assert main(["train", *blocks, *SMALL, "--quiet", "--out", run]) == 0
    assert main(["evaluate", run]) == 0
    assert main(["analyze", "layers", run]) == 0
    assert re.search(r"^conv1.conv .*\nconv2 .*\nnetwork ", capsys.readouterr().out, re.M)


def test_a_block_may_not_be_called_as_the_whole_network_is(error_line: ErrorLine) -> None:
    Path("odd.py").write_text(FILE.replace("self.first", "self.test"))
    arguments = ["train", "--model", "odd.py:Net", "--blocks", "test,second"]
    assert "block 'test' has a name that metrics.csv has for the whole" in error_line(arguments)


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are found by themselves; a bias under BatchNorm has no gradient to compare."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    command = ["bench", "--model", "nets/net.py:Net", "--rules", "lls", "--backend", "reference"]
    sizes = ["--batch-size", "4", "--image-size", "8", "--rounds", "2", "--device", "cpu"]
    assert main([*command, *sizes]) == 0
    out = capsys.readouterr().out
    assert out.startswith("gate green")
    assert all(float(error) < 1e-3 for error in re.findall(r"^  lls: .* (\S+)$", out, re.M))
    assert re.search(r"^lls \(autograd\) ", out, re.M)


def test_list_tells_of_the_other_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["list", "models", "torchvision:resnet1*"]) == 0
    names = ["resnet101", "resnet152", "resnet18"]
    assert capsys.readouterr().out.split() == [f"torchvision:{name}" for name in names]
    assert main(["list", "models", "vgg*"]) == 0
    out = capsys.readouterr().out
    assert "vgg8" in out
    assert "smallconv" not in out
    assert re.search(r"torchvision:NAME \(\d\d+ models\)", out)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["list", "models"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "timm:NAME (models of timm need it: pip install 'locallearn[timm]')" in out
