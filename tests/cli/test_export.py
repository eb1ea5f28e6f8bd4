"""`locallearn export`: the file, what is said of it, and every line of complaint."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn.cli import main
from locallearn.data import read_for_prediction
from locallearn.engine import load_trained
from locallearn.engine.weights import weights_digest
from locallearn.export import load_export

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

CLASSES = ("apple", "pear", "plum")
ErrorLine = Callable[[list[str]], str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network trained on colour images that a class' colour tells; beside it `data`."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            folder = root / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(14):
                pixels = rng.normal(110, 40, (12, 12, 3))
                pixels[..., label] += 60
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(folder / f"{i:03d}.png")
    command = ["train", "--dataset", "folder", "--data-dir", str(root / "data"), "--epochs", "6"]
    command += ["--rule", "lls-mxm", "--batch-size", "8", "--width", "0.25", "--num-threads", "1"]
    assert main([*command, "--quiet", "--augment", "none", "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture(autouse=True)
def _narrow(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_onnx_with_exits_and_int8(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    learner = load_trained(run).learner
    record = {
        "format": "locallearn-exits",
        "weights": weights_digest(learner),
        "temperatures": {"conv1": 0.5, "output": 2.0},
        "threshold": 0.8,
        "num_images": 6,
    }
    (run / "exits.json").write_text(json.dumps(record))
    target, report = tmp_path / "net.onnx", tmp_path / "net.json"
    command = ["export", str(run), "--exits", "--int8", "--images", "40", "--out", str(target)]
    try:
        assert main([*command, "--json", str(report)]) == 0
    finally:
        (run / "exits.json").unlink()
    captured = capfd.readouterr()
    assert captured.err == ""  # nor the exporters' own words
    out = captured.out
    head = f"{target}: images, uint8 (batch, 12, 12, 3) -> logits, conv1, conv2, conv3, linear1\n"
    assert head in out
    said = r"on 40 test images: logits differ by \S+e-0\d at most \(tolerance 0.0001\), 40 of 40 in"
    assert re.search(said, out)
    assert "with temperature 1 in the file: conv2, conv3, linear1; `locallearn" in out
    assert re.search(r"net\.int8\.onnx +\d+ KiB +\d+ of 40 +\d+\.\d\d %", out)
    said = r"net\.int8\.onnx: accuracy ([+-]\d+\.\d\d) points against net\.onnx; static, QDQ: int8"
    (points,) = re.findall(said, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net.int8.onnx",
        "net.json",
        "net.onnx",
    ]

    exported, small = load_export(target), load_export(tmp_path / "net.int8.onnx")
    about = exported.description
    assert about.origin.class_names == CLASSES
    assert (about.origin.model, about.origin.rule) == ("smallconv", "lls-mxm")
    assert (about.origin.dataset, about.origin.run, about.origin.num_epochs) == ("data", "run", 6)
    assert about.exit_threshold == 0.8
    assert [each.temperature for each in about.exits] == [0.5, 1.0, 1.0, 1.0]
    assert about.temperature == 2.0
    assert small.description.exits == about.exits

    # From the files alone, pixels in; against the learner, which gets what `predict` reads.
    paths = sorted((run.parent / "data" / "test").rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    inputs = torch.cat(list(read_for_prediction(paths, load_trained(run).config.inputs)))
    expected = learner(inputs)
    torch.testing.assert_close(exported(pixels)["logits"], expected, atol=1e-5, rtol=1e-5)
    labels = torch.arange(3).repeat_interleave(14)
    float32, int8 = figures(report)["files"]
    # 40 of the 42: each figure is off by the two at most.
    for file, model in ((float32, exported), (int8, small)):
        right = int((model(pixels)["logits"].argmax(1) == labels).sum())
        assert right - 2 <= file["num_right"] <= right
        assert file["accuracy"] == pytest.approx(100 * file["num_right"] / 40)
        assert file["num_bytes"] == (tmp_path / file["file"]).stat().st_size
    assert float32["num_right"] == float32["num_right_model"] == int8["num_right_model"]
    assert float32["accuracy"] > 60
    assert max(float32["max_difference"].values()) <= 1e-4
    assert max(int8["max_difference"].values()) > 1e-4
    assert float(points) == pytest.approx(int8["accuracy"] - float32["accuracy"], abs=0.005)
    assert int8["num_bytes"] < float32["num_bytes"]
    assert set(figures(report)["time_ms_per_image"]) == {"1", "32"}


def test_torch_export_into_the_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = {path.name for path in copy.iterdir()}
    command = ["export", str(copy), "--format", "torch-export", "--exits"]
    assert main([*command, "--input", "normalized"]) == 0
    out = capsys.readouterr().out
    assert f"{copy}/model.pt2: images, float32 (batch, 3, 12, 12) -> logits, conv1" in out
    assert "on 42 test images" in out  # all that there are
    names = "conv1, conv2, conv3, linear1, output"
    assert f"note: not calibrated, and so with temperature 1 in the file: {names}; `loc" in out
    assert {path.name for path in copy.iterdir()} == before | {"model.pt2"}


def test_without_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error_line: ErrorLine
) -> None:
    """Where the images are gone, it says so, and how to go on without."""
    target = tmp_path / "net.pt2"
    command = ["export", str(run), "--format", "torch-export", "--out", str(target)]
    line = error_line([*command, "--data-dir", str(tmp_path / "nothing")])
    assert "nothing" in line
    assert line.endswith("--images 0 does it on noise.")
    assert not list(tmp_path.iterdir())
    assert main([*command, "--data-dir", str(tmp_path / "nothing"), "--images", "0"]) == 0
    out = capsys.readouterr().out
    assert "on 32 images of noise: logits differ" in out
    assert "note: nothing was checked on real images (--images 0)" in out
    assert target.is_file()


def test_a_file_that_differs_is_not_left(run: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    target = tmp_path / "net.pt2"
    target.write_bytes(b"the old one")
    command = ["export", str(run), "--format", "torch-export", "--out", str(target)]
    line = error_line([*command, "--tolerance", "0", "--json", str(tmp_path / "net.json")])
    assert re.search(r"'logits' differs by up to \S+ on 42 images.*Nothing was written", line)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    assert target.read_bytes() == b"the old one"


def test_interrupted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the file is compared with the network."""

    def interrupt(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("locallearn.export.verification.compare", interrupt)
    command = ["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "net.pt2")]
    assert main(command) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "tflite"], "unknown format 'tflite'.*Valid: onnx, torch-export"),
        (["--input", "jpeg"], "unknown input 'jpeg'.*Valid: normalized, pixels"),
        (["--images", "-1"], "--images must be at least 0, got -1"),
        (["--int8", "--images", "0"], "on real images; leave out --images 0"),
        (["--format", "torch-export", "--int8"], "--int8 is of ONNX files; give --format onnx"),
        (["--format", "torch-export", "--opset", "18"], "--opset is of ONNX files"),
        (["--opset", "7"], "--opset must be between 18 and 23, got 7"),
        (["--out", "net.pt2"], r"--out net.pt2 must end in \.onnx"),
        (["--out", "none/net.onnx"], "--out none/net.onnx: there is no directory none"),
        (["--json", "none/net.json"], "--json none/net.json: there is no directory none"),
        (["--tolerance", "-0.5"], "the tolerance must be at least 0, got -0.5"),
    ],
)
def test_bad_options(
    options: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_line: ErrorLine,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(said, error_line(["export", str(run), *options]))
    assert not list(tmp_path.iterdir())


def test_no_run(tmp_path: Path, error_line: ErrorLine) -> None:
    line = error_line(["export", str(tmp_path / "none"), "--out", str(tmp_path / "net.onnx")])
    assert "does not exist; give a run directory or a file of one" in line
