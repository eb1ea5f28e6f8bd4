"""From run directories to tables: numbers worked by hand."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.analysis import MeanStd, step_cost
from locallearn.models import build_model
from locallearn.recipes import (
    Changes,
    Plan,
    RecipeTable,
    collect,
    make_plan,
    measure,
    to_markdown,
    unmeasured,
    write_table,
)
from locallearn.recipes.writing import to_csv, to_latex
from locallearn.rules import build_rule


@pytest.fixture
def plan(table: RecipeTable, tmp_path: Path, put_run: Callable) -> Plan:
    """LLS with both seeds done, backpropagation with one of them."""
    plan = make_plan(table, Changes(num_threads=3), tmp_path)
    lls0, bp0, lls1, _ = plan.cells
    put_run(lls0, 80.0, 91.0, 90.0, step_time_ms=10.0)
    put_run(lls1, 80.0, 91.0, 94.0, step_time_ms=14.0)
    put_run(bp0, 95.0, step_time_ms=20.0)
    return plan


def test_collect(plan: Plan) -> None:
    lls, bp = collect(plan)
    assert lls.test_acc == MeanStd.of([90.0, 94.0])
    assert lls.best_test_acc == MeanStd.of([91.0, 94.0])
    assert lls.step_time_ms == 12.0
    assert [run.seed for run in lls.runs] == [0, 1]
    assert bp.test_acc == MeanStd(95.0, None)
    network = build_model("smallconv", num_classes=10, in_channels=1, image_size=8)
    sizes = {"image_shape": (1, 8, 8), "batch_size": 128}
    ours, backprop = (step_cost(network, build_rule(rule), **sizes) for rule in ("lls", "bp"))
    assert lls.cost == ours
    assert lls.bp_signal_macs == bp.bp_signal_macs == backprop.learning_signal_macs
    assert lls.peak_activation_mib is None


def test_commands_make_the_runs(plan: Plan) -> None:
    lls, _ = collect(plan)
    words = shlex.split(lls.runs[1].command)
    assert words[:2] == ["locallearn", "train"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given == {
        "--dataset": "digits",
        "--model": "smallconv",
        "--rule": "lls",
        "--epochs": "4",
        "--limit-train": "200",
        "--limit-test": "60",
        "--num-threads": "3",
        "--seed": "1",
    }


def test_nothing_run_yet(table: RecipeTable, tmp_path: Path) -> None:
    plan = make_plan(table, Changes(), tmp_path)
    rows = collect(plan)
    assert [row.test_acc for row in rows] == [None, None]
    lines = to_markdown(plan, rows).splitlines()
    row = "| digits | smallconv | lls | square | - | - | 0 | - | - | - | - | - | - |"
    assert row in lines
    assert "commands" not in to_markdown(plan, rows)
    assert next(csv.DictReader(io.StringIO(to_csv(plan, rows))))["test_acc_mean"] == ""
    assert to_latex(plan, rows).count(r"\\") == 3


def test_markdown(plan: Plan) -> None:
    rows = collect(plan)
    lines = to_markdown(plan, rows).splitlines()
    signal, total = rows[0].cost.learning_signal_macs, rows[0].cost.total_macs
    (lls,) = (line for line in lines if line.startswith("| digits | smallconv | lls "))
    cells = [cell.strip() for cell in lls.strip("|").split("|")]
    assert cells[:7] == [
        "digits",
        "smallconv",
        "lls",
        "square",
        "92.00 ± 2.83",
        "92.50 ± 2.12",
        "2",
    ]
    assert float(cells[7]) == pytest.approx(signal / 1e3, rel=0.01)
    assert float(cells[8].removesuffix("x")) == pytest.approx(
        rows[0].bp_signal_macs / signal, rel=0.03
    )
    assert float(cells[9]) == pytest.approx(total / 1e6, rel=0.01)
    assert cells[10:] == ["-", "0", "12.0"]
    assert "rehearsal" not in "\n".join(lines)
    assert any(line.startswith("- 3 runs on ") for line in lines)
    assert "  (seed 0: 90.00 %, 1: 94.00 %)" in lines


def test_a_rehearsal_is_marked_in_every_format(
    table: RecipeTable, tmp_path: Path, put_run: Callable
) -> None:
    plan = make_plan(table, Changes(epochs_scale=0.5), tmp_path / "out", seeds=[0])
    put_run(plan.cells[0], 50.0)
    markdown, text, latex, record = (path.read_text() for path in write_table(plan, collect(plan)))
    assert "**A rehearsal, not the paper's experiment:** 2 of 4 epochs; seed 0 of 2." in markdown
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["departure"] for row in rows] == ["2 of 4 epochs"] * 2
    assert rows[0]["test_acc_mean"] == "50.0"
    assert rows[0]["test_acc_std"] == ""
    assert r"\textbf{A rehearsal, not the paper's experiment:} 2 of 4 epochs" in latex
    assert json.loads(record)["departures"]["digits-lls"] == ["2 of 4 epochs"]


def test_latex_escapes(plan: Plan) -> None:
    text = to_latex(plan, collect(plan))
    assert r"\caption{Digits \& 100 \% (nobody, 2026).}" in text
    assert r"92.00 $\pm$ 2.83" in text
    assert r"\begin{tabular}{llllrrrrrrrrr}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {12}
    assert "% locallearn train --dataset digits" in text


def test_record_is_whole(plan: Plan) -> None:
    paths = write_table(plan, collect(plan))
    assert [path.name for path in paths] == [f"digits.{s}" for s in ("md", "csv", "tex", "json")]
    found = json.loads(paths[-1].read_text())
    run = found["rows"][0]["runs"][1]
    assert run["test_acc_per_epoch"] == [80.0, 91.0, 94.0]
    assert run["environment"]["packages"]["torch"]
    assert found["rows"][0]["basis"] == "square"
    assert found["rows"][1]["basis"] is None


def test_measured_once_for_each_recipe(plan: Plan, one_thread: None) -> None:
    assert [cell.name for cell in unmeasured(plan)] == ["digits-lls, seed 0", "digits-bp, seed 0"]
    for cell in unmeasured(plan):
        measure(cell)
    assert unmeasured(plan) == []
    lls, bp = collect(plan)
    # BatchNorm's input and output at the first block: 128 images of 8x8 in 32 channels, float32.
    assert bp.peak_activation_mib > 2 * 128 * 64 * 32 * 4 / 2**20
    assert 0 < lls.peak_activation_mib < bp.peak_activation_mib
