"""docs/kernels.md says what the code counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from locallearn.engine.op_benchmark import count_bytes
from locallearn.models import build_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text()
OPS = ("channel_stats", "block_forward", "local_head", "block_backward", "schedulefree_step")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_smallconv(precision: str) -> None:
    model = build_model("smallconv", num_classes=10, in_channels=3, image_size=32)
    counted = count_bytes(
        model, image_shape=(3, 32, 32), batch_size=128, num_classes=10, precision=precision
    )
    rows = re.findall(rf"^\| (\w+) \| {precision} \| (\d.+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(dict.fromkeys(block for block, _ in counted))
    for name, cells in rows:
        expected = [f"{counted[name, op] / 1e6:.2f}" for op in OPS]
        assert cells.split(" | ") == expected


def test_sum_of_smallconv() -> None:
    cells = re.findall(r"^\| \w+ \| fp32 \| (\d.+) \|$", PAGE, re.MULTILINE)
    total = sum(float(cell) for row in cells for cell in row.split(" | "))
    (said,) = re.findall(r"The whole of fp32 is\s+(\d+) MB", PAGE)
    assert total == pytest.approx(int(said), abs=0.5)
    (time,) = re.findall(r"data sheet, (\d+) us", PAGE)
    assert int(time) == round(total / 4.8)


def test_registers_are_the_record_s() -> None:
    record = json.loads((ROOT / "benchmarks/results/cuda-resources.json").read_text())
    found: dict[str, dict[str, list[int]]] = {}
    for kernel in record["kernels"]:
        assert kernel["stack_bytes"] == kernel["spill_bytes"] == 0
        if kernel["architecture"] == "sm_90" and kernel["by_a_model"]:
            types = found.setdefault(kernel["kernel"], {})
            types.setdefault(kernel["constants"]["ELEMENT"], []).append(kernel["registers"])
    rows = re.findall(r"^\| `(\w+)` \| ([\d-]+) \| ([\d-]*) ?\|$", PAGE, re.MULTILINE)
    assert {name for name, *_ in rows} == set(found)
    for name, *said in rows:
        for text, element in zip(said, ("float", "bfloat16"), strict=True):
            registers = found[name].get(element)
            ends = {min(registers), max(registers)} if registers else set()
            assert text == "-".join(map(str, sorted(ends))), name
