"""`locallearn plan`, on a tiny network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from locallearn.cli import main
from locallearn.engine import measured_steps
from locallearn.engine.measured_steps import MeasuredSteps

TINY = ["plan", "--image-size", "8", "--batch-size", "4", "--repeats", "1", "--device", "cpu"]
TINY += ["--backend", "autograd", "--classes", "3"]


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, drawn = tmp_path / "plan.json", tmp_path / "plan.png"
    more = ["--devices", "2", "--bandwidth", "1", "--latency", "50"]
    assert main([*TINY, *more, "--json", str(file), "--plot", str(drawn)]) == 0
    shown = capsys.readouterr().out
    assert "links 1 GB/s, 50 us" in shown
    for way in ("layers:2", "data:2", "gpipe:"):
        assert f"\n{way}" in shown
    assert "Assumed: all devices are like this one, one process on each, and none slows" in shown
    assert max(len(line) for line in shown.splitlines()[2:8]) <= 80

    document = json.loads(file.read_text())
    assert [each["way"] for each in document["ways"]] == shown_ways(shown)
    assert document["link"]["bandwidth_gb_s"] == 1
    assert document["link"]["host_ms_per_mib"] > 0
    sizes: dict[str, list[dict[str, Any]]] = document["costs"]["local"]
    assert list(sizes) == ["2", "4"]
    names = ["conv1", "conv2", "conv3", "linear1", ""]
    for costs in (*sizes.values(), *document["costs"]["backprop"].values()):
        assert [cost["name"] for cost in costs] == names
    assert document["one_device_ms"] == pytest.approx(sum(c["step_ms"] for c in sizes["4"]))
    # What comes into the first block is the images: (4, 3, 8, 8) in float32.
    assert sizes["4"][0]["input_bytes"] == 4 * 4 * 3 * 8 * 8
    (layers,) = (each for each in document["ways"] if each["way"] == "layers:2")
    assert sum(len(stage["blocks"]) for stage in layers["stages"]) == len(names)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def shown_ways(shown: str) -> list[str]:
    words = [line.split()[0] for line in shown.splitlines() if line]
    return [word for word in words if word.startswith(("layers:", "data:"))]


def test_more_devices_than_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--devices", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown_ways(shown) == ["layers:4,data:2"]
    assert "torchrun --nproc-per-node 8 -m locallearn train" in shown
    assert " --num-threads 1 --parallel layers:4,data:2 --balance 1,1,1,1\n" in shown
    assert "layers alone can use at most 4 devices" in shown
    assert "data alone can use at most 2 devices" in shown


def test_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--devices", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "\ntrain so, with a --dataset of 3x8x8 in 3 classes (--image-size 8, of one that has it): "
        "locallearn train --model smallconv --rule lls-mxm --batch-size 4 --backend autograd"
        in shown
    )
    assert shown_ways(shown) == ["layers:1"]


def test_beside_others_that_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[MeasuredSteps, int]] = []

    @contextlib.contextmanager
    def beside(steps: MeasuredSteps, num_processes: int) -> Iterator[None]:
        asked.append((steps, num_processes))
        yield

    monkeypatch.setattr(measured_steps, "steps_beside", beside)
    assert main([*TINY, "--beside", "2"]) == 0
    ((steps, num_processes),) = asked
    assert (steps.model, steps.batch_size, num_processes) == ("smallconv", 4, 2)
    assert "as measured beside 2 other processes on this host" in capsys.readouterr().out


def test_networks_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here with a skip around the second block: no stage begins there, as it would read more."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())\n"
        "        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())\n"
        "        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())\n"
        "        self.head = nn.Linear(8, num_classes)\n"
        "    def forward(self, x):\n"
        "        x = self.first(x)\n"
        "        x = x + self.second(x)\n"
        "        return self.head(self.third(x).mean((2, 3)))\n"
    )
    model = f"{tmp_path / 'mine.py'}:Net"
    file = tmp_path / "plan.json"
    assert main([*TINY, "--model", model, "--devices", "2", "--json", str(file)]) == 0
    assert "layers:2" in shown_ways(capsys.readouterr().out)
    document = json.loads(file.read_text())
    assert document["most_stages"] == 2
    (layers,) = (each for each in document["ways"] if each["way"] == "layers:2")
    assert [stage["blocks"] for stage in layers["stages"]] == [["first", "second"], ["third", ""]]
    assert [stage["blocks"] for stage in document["gpipe"][0]["stages"]] == [
        ["first", "second"],
        ["third", ""],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--devices", "9999"], "--devices must be at most 4096, got 9999"),
        (["--bandwidth", "0"], "--bandwidth must be a number of GB/s above 0, got 0.0"),
        (["--bandwidth", "nan"], "--bandwidth must be a number of GB/s above 0, got nan"),
        (["--latency", "-1"], "--latency must be a number of microseconds from 0, got -1.0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--num-threads", "0"], "--num-threads must be at least 1, got 0"),
        (["--beside", "-1"], "--beside must be at least 0, got -1"),
        (["--precision", "int8"], "unknown precision 'int8'"),
        (["--model", "smallcon"], "unknown model 'smallcon'"),
        (["--rule", "lls-x"], "unknown rule 'lls-x'"),
        (["--rule", "dfa"], "rule 'dfa' needs the error at the network's output"),
        (["--rule", "bp"], "rule 'bp' needs gradients through every later block"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: there is no directory"),
        (["--devices", "7"], "--devices 7 can't be used whole: the network can be cut into at"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, error_line: Callable[[list[str]], str]
) -> None:
    assert message in error_line([*TINY, *arguments])
