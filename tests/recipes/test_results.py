"""From run directories to tables: numbers worked by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.analysis import MeanStd, step_cost
from locallearn.analysis.measured import read_peak_mib
from locallearn.engine import RunDirectory
from locallearn.errors import UserError
from locallearn.models import build_model
from locallearn.recipes import (
    Changes,
    Plan,
    RecipeTable,
    collect,
    make_plan,
    read_table,
    remarks,
    write_table,
)
from locallearn.recipes.step_memory import measure_peak
from locallearn.recipes.writing import to_csv, to_latex, to_markdown
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
        "--device": "cpu",
        "--num-threads": "3",
        "--seed": "1",
    }


def test_nothing_run_yet(table: RecipeTable, tmp_path: Path) -> None:
    plan = make_plan(table, Changes(), tmp_path)
    rows = collect(plan)
    assert [row.test_acc for row in rows] == [None, None]
    lines = to_markdown(plan, rows).splitlines()
    nothing = " - |" * 6
    assert f"| digits-lls | digits | smallconv | lls | square | - | - | 0 of 2 |{nothing}" in lines
    assert "**Unfinished: 4 of 4 runs have no results.**" in lines
    assert "Made by" not in to_markdown(plan, rows)
    assert next(csv.DictReader(io.StringIO(to_csv(rows))))["test_acc_mean"] == ""
    assert to_latex(plan, rows).count(r"\\") == 3


def test_markdown(plan: Plan) -> None:
    rows = collect(plan)
    lines = to_markdown(plan, rows).splitlines()
    signal, total = rows[0].cost.learning_signal_macs, rows[0].cost.total_macs
    (lls,) = (line for line in lines if line.startswith("| digits-lls "))
    cells = [cell.strip() for cell in lls.strip("|").split("|")]
    assert cells[:5] == ["digits-lls", "digits", "smallconv", "lls", "square"]
    assert cells[5:8] == ["92.00 ± 2.83", "92.50 ± 2.12", "2"]
    assert float(cells[8]) == pytest.approx(signal / 1e3, rel=0.01)
    ratio = rows[0].bp_signal_macs / signal
    assert float(cells[9].removesuffix("x")) == pytest.approx(ratio, rel=0.03)
    assert float(cells[10]) == pytest.approx(total / 1e6, rel=0.01)
    assert cells[11:] == ["-", "0", "12.0"]
    assert not any("rehearsal" in remark for remark in remarks(plan, rows))
    assert "**Unfinished: 1 of 4 runs have no results.**" in lines
    assert any(line.startswith("- 3 runs on ") for line in lines)
    assert f"    - 94.00 %: `{rows[0].runs[1].command}`" in lines


def test_runs_on_unlike_machines_have_no_common_step_time(plan: Plan, put_run: Callable) -> None:
    lls0, _, lls1, _ = plan.cells
    slower = dataclasses.replace(lls1.settings, num_threads=1)
    put_run(dataclasses.replace(lls1, settings=slower), 94.0, step_time_ms=30.0)
    lls, _ = collect(plan)
    assert [run.num_threads for run in lls.runs] == [3, 1]
    assert lls.step_time_ms is None
    assert "--num-threads 1" in lls.runs[1].command
    assert lls0.settings.num_threads == 3


def test_runs_on_other_data_are_not_averaged(plan: Plan) -> None:
    path = plan.cells[2].path / "config.json"
    path.write_text(path.read_text().replace('"fingerprint": "x"', '"fingerprint": "y"'))
    with pytest.raises(UserError, match=r"seed-1 was trained .* on other data than .*seed-0"):
        collect(plan)


def test_groups_of_blocks_have_no_counted_cost(
    table: RecipeTable, tmp_path: Path, put_run: Callable
) -> None:
    recipe = dataclasses.replace(
        table.recipes[0],
        settings=dataclasses.replace(table.recipes[0].settings, group_blocks=2),
    )
    grouped = dataclasses.replace(table, recipes=(recipe,))
    plan = make_plan(grouped, Changes(), tmp_path / "out")
    put_run(plan.cells[0], 50.0)
    (row,) = collect(plan)
    assert row.rule == "lls:group_blocks=2"
    assert row.cost is None
    assert row.bp_signal_macs is None
    assert "| lls:group_blocks=2 |" in to_markdown(plan, [row])


def test_a_rehearsal_is_marked_in_every_format(
    table: RecipeTable, tmp_path: Path, put_run: Callable
) -> None:
    plan = make_plan(table, Changes(epochs_scale=0.5), tmp_path / "out", seeds=[0])
    put_run(plan.cells[0], 50.0)
    markdown, text, latex, record = (path.read_text() for path in write_table(plan, collect(plan)))
    mark = "A rehearsal, not the recipes as they are written: 2 of 4 epochs; 1 of 2 seeds: 0."
    assert f"**{mark}**" in markdown
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["departures"] for row in rows] == ["2 of 4 epochs; 1 of 2 seeds: 0"] * 2
    assert rows[0]["test_acc_mean"] == "50.0"
    assert rows[0]["test_acc_std"] == ""
    assert mark in latex
    assert json.loads(record)["remarks"][0] == mark
    assert json.loads(record)["rows"][0]["departures"] == ["2 of 4 epochs", "1 of 2 seeds: 0"]
    # Not where the whole table's would lie.
    names = sorted(path.name for path in (tmp_path / "out").glob("*.*"))
    assert names == [f"digits-rehearsal.{suffix}" for suffix in ("csv", "json", "md", "tex")]


def test_latex_escapes(plan: Plan) -> None:
    text = to_latex(plan, collect(plan))
    assert r"\caption{Digits \& 100 \% (nobody, 2026). Unfinished: 1 of 4 runs" in text
    assert r"\label{tab:digits}" in text
    assert r"92.00 $\pm$ 2.83" in text
    assert r"\begin{tabular}{lllllrrrrrrrrr}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {13}
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


def test_the_memory_of_a_step_is_measured_beside_the_runs(plan: Plan, one_thread: None) -> None:
    for cell in plan.cells[:2]:
        assert read_peak_mib(cell.path) is None
        settings = dataclasses.replace(cell.settings, num_threads=1)
        config = RunDirectory(cell.path).read_config()
        measure_peak(cell.path, dataclasses.replace(config, settings=settings.resolve()))
    lls, bp = collect(plan)
    # BatchNorm's input and output at the first block: 128 images of 8x8 in 32 channels, float32.
    assert bp.peak_activation_mib > 2 * 128 * 64 * 32 * 4 / 2**20
    assert 0 < lls.peak_activation_mib < bp.peak_activation_mib
    plan.cells[0].folder.joinpath("step.json").write_text("{")
    assert read_peak_mib(plan.cells[0].path) is None


def test_memory_of_a_device_that_is_not_there(plan: Plan) -> None:
    config = RunDirectory(plan.cells[0].path).read_config()
    elsewhere = dataclasses.replace(config.settings, device="mps")
    with pytest.raises(UserError, match=r"mps|MPS"):
        measure_peak(plan.cells[0].path, dataclasses.replace(config, settings=elsewhere))


def test_costs_of_a_model_from_elsewhere_are_not_counted(tmp_path: Path, put_run: Callable) -> None:
    (tmp_path / "net.py").write_text("raise RuntimeError('not run to be shown')")
    (tmp_path / "net.toml").write_text(
        "[[recipe]]\n"
        f'name = "own"\nmodel = "{tmp_path}/net.py:build:depth=3"\n'
        'dataset = "digits"\nrule = "lls"\nepochs = 4\nseeds = [0]\n'
    )
    plan = make_plan(read_table(str(tmp_path / "net.toml")), Changes(), tmp_path)
    put_run(plan.cells[0], 50.0)
    (row,) = rows = collect(plan)
    assert row.cost is row.bp_signal_macs is None
    assert "| own | digits | net.py:build:depth=3 | lls | square | 50.00 |" in to_markdown(
        plan, rows
    )
    (line,) = csv.DictReader(io.StringIO(to_csv(rows)))
    assert (line["test_acc_mean"], line["total_macs"]) == ("50.0", "")
    assert "net.py:build:depth=3 & lls" in to_latex(plan, rows)
