"""A table of results as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locallearn.analysis import Cost, MeanStd
from locallearn.engine.config import model_name
from locallearn.engine.files import write_atomically, write_json
from locallearn.recipes.plan import Plan
from locallearn.recipes.results import RowResult

_NOTHING = "-"
_REHEARSAL = "A rehearsal, not the recipes as they are written:"
_FORMATS = ("md", "csv", "tex", "json")


@dataclass(frozen=True)
class _Column:
    """A column of the tables for people."""

    heading: str
    cell: Callable[[RowResult], str]
    is_number: bool = True


def _spread(spread: MeanStd | None) -> str:
    return _NOTHING if spread is None else str(spread)


def _macs(count: int, unit: float) -> str:
    """To three digits, in that unit."""
    value = count / unit
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _cost(row: RowResult, say: Callable[[Cost], str]) -> str:
    return _NOTHING if row.cost is None else say(row.cost)


def _signal_ratio(row: RowResult) -> str:
    """How many times fewer MACs the learning signal takes than backpropagation's."""
    if row.cost is None or row.bp_signal_macs is None:
        return _NOTHING
    if row.cost.learning_signal_macs == 0:
        return "none"
    ratio = row.bp_signal_macs / row.cost.learning_signal_macs
    return f"{ratio:,.{0 if ratio >= 10 else 1}f}x"


def _number(value: float | None, digits: int = 1) -> str:
    return _NOTHING if value is None else f"{value:,.{digits}f}"


_COLUMNS = (
    _Column("recipe", lambda row: row.recipe.name, is_number=False),
    _Column("dataset", lambda row: row.dataset, is_number=False),
    _Column("model", lambda row: model_name(row.recipe.settings), is_number=False),
    _Column("rule", lambda row: row.rule, is_number=False),
    _Column("basis", lambda row: row.basis or _NOTHING, is_number=False),
    _Column("accuracy, %", lambda row: _spread(row.test_acc)),
    _Column("best, %", lambda row: _spread(row.best_test_acc)),
    _Column("runs", lambda row: say_runs(row)),
    _Column(
        "signal, kMAC", lambda row: _cost(row, lambda cost: _macs(cost.learning_signal_macs, 1e3))
    ),
    _Column("fewer than bp's", _signal_ratio),
    _Column("step, MMAC", lambda row: _cost(row, lambda cost: _macs(cost.total_macs, 1e6))),
    _Column("peak, MiB", lambda row: _number(row.peak_activation_mib)),
    _Column(
        "rule's parameters",
        lambda row: _cost(row, lambda cost: f"{cost.num_additional_params:,}"),
    ),
    _Column("ms a step", lambda row: _number(row.step_time_ms)),
)

_LEGEND = """\
accuracy: of the test set after the last epoch, mean ± sample standard deviation over the seeds;
best: the same after the epoch that was best on the test set, which is how the authors report.
signal: multiply-accumulates that make the learning signal, for each image; fewer than bp's: how
many times. step: all multiply-accumulates of a training step, for each image. peak: what a step of
a batch holds at most beyond weights, optimizer state and images, measured. ms a step: median, as
the runs trained, beside whatever else ran on the machine; `locallearn bench` compares speed."""


def say_runs(row: RowResult) -> str:
    """How many there are, and of how many where some are missing."""
    num = len(row.runs)
    return str(num) if num == row.num_planned else f"{num} of {row.num_planned}"


def rehearsal_lines(plan: Plan) -> list[str]:
    """How the runs depart from the recipes, a line each; empty where they do not."""
    names: dict[str, list[str]] = {}
    for recipe in plan.table.recipes:
        if words := plan.departures(recipe):
            names.setdefault("; ".join(words), []).append(recipe.name)
    return [
        words if len(own) == len(plan.table.recipes) else f"{words} ({', '.join(own)})"
        for words, own in names.items()
    ]


def remarks(plan: Plan, rows: Sequence[RowResult]) -> list[str]:
    """What is to be known before the table is read, a sentence each; none of a whole table."""
    found = []
    if lines := rehearsal_lines(plan):
        found.append(f"{_REHEARSAL} {'; '.join(lines)}.")
    if plan.table.is_part:
        found.append(f"A part: {len(rows)} of the table's {plan.table.num_in_file} rows.")
    missing = sum(row.num_planned - len(row.runs) for row in rows)
    if missing:
        found.append(f"Unfinished: {missing} of {len(plan.cells)} runs have no results.")
    return found


def _caption(plan: Plan) -> str:
    source = f" ({plan.table.source})" if plan.table.source else ""
    return f"{plan.table.title}{source}"


def to_markdown(plan: Plan, rows: Sequence[RowResult]) -> str:
    """Caption, how it departs from the recipes, the table, its legend, and every run's command."""
    lines = [f"## {_caption(plan)}", ""]
    for remark in remarks(plan, rows):
        lines += [f"**{remark}**", ""]
    lines.append("| " + " | ".join(column.heading for column in _COLUMNS) + " |")
    lines.append("|" + "|".join("---:" if column.is_number else "---" for column in _COLUMNS) + "|")
    for row in rows:
        lines.append("| " + " | ".join(column.cell(row) for column in _COLUMNS) + " |")
    lines += ["", _LEGEND, ""]
    made = [row for row in rows if row.runs]
    if made:
        lines += ["Made by:", ""]
    for row in made:
        lines.append(f"- {row.recipe.name}")
        lines += [f"    - {run.test_acc:.2f} %: `{run.command}`" for run in row.runs]
    if made:
        lines += ["", "On:", "", *(f"- {line}" for line in _where(rows)), ""]
    return "\n".join(lines)


def _where(rows: Sequence[RowResult]) -> list[str]:
    """On what the runs were made, a line for each kind of machine and version."""
    places: dict[str, int] = {}
    for row in rows:
        for run in row.runs:
            there = run.environment
            place = f"{there['device_name']}, torch {there['packages']['torch']}"
            if there.get("git_commit"):
                commit, plus, changes = there["git_commit"].partition("+")
                place += f", commit {commit[:12]}{plus}{changes}"
            places[place] = places.get(place, 0) + 1
    return [f"{num} {'run' if num == 1 else 'runs'} on {place}" for place, num in places.items()]


def to_csv(rows: Sequence[RowResult]) -> str:
    """A line for each row, all figures in full."""
    text = io.StringIO()
    lines = [
        {
            "recipe": row.recipe.name,
            "dataset": row.dataset,
            "model": model_name(row.recipe.settings),
            "rule": row.rule,
            "basis": row.basis,
            "departures": "; ".join(row.departures),
            "num_planned": row.num_planned,
            "num_runs": len(row.runs),
            "seeds": " ".join(str(run.seed) for run in row.runs),
            "test_acc_mean": row.test_acc and row.test_acc.mean,
            "test_acc_std": row.test_acc and row.test_acc.std,
            "best_test_acc_mean": row.best_test_acc and row.best_test_acc.mean,
            "best_test_acc_std": row.best_test_acc and row.best_test_acc.std,
            **_cost_figures(row),
            "peak_activation_mib": row.peak_activation_mib,
            "step_time_ms": row.step_time_ms,
            "commands": "; ".join(run.command for run in row.runs),
        }
        for row in rows
    ]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _cost_figures(row: RowResult) -> dict[str, int | None]:
    """What is counted of a step."""
    names = ("learning_signal_macs", "total_macs", "num_params", "num_additional_params")
    counted = {name: None if row.cost is None else getattr(row.cost, name) for name in names}
    return counted | {"bp_learning_signal_macs": row.bp_signal_macs}


def to_latex(plan: Plan, rows: Sequence[RowResult]) -> str:
    """A table environment; its document needs the packages booktabs and graphicx."""
    caption = " ".join([f"{_caption(plan)}.", *remarks(plan, rows)])
    label = re.sub(r"[^A-Za-z0-9-]", "-", plan.name)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if column.is_number else 'l' for column in _COLUMNS)}}}",
        r"\toprule",
        " & ".join(_latex(column.heading) for column in _COLUMNS) + r" \\",
        r"\midrule",
    ]
    before = None
    for row in rows:
        group = (row.dataset, row.recipe.settings.model)
        if before not in (None, group):
            lines.append(r"\addlinespace")
        before = group
        lines.append(" & ".join(_latex(column.cell(row)) for column in _COLUMNS) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", "", r"\smallskip", r"\footnotesize"]
    lines += [_latex(_LEGEND.replace("`", "")), r"\end{table}"]
    comments = [f"% {run.command}" for row in rows for run in row.runs]
    return "\n".join([*comments, *lines]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{each: "\\" + each for each in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(each, each) for each in text)


def to_record(plan: Plan, rows: Sequence[RowResult]) -> dict[str, Any]:
    """All of it, for a JSON file."""
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "source": plan.table.source,
        "remarks": remarks(plan, rows),
        "rows": [
            {
                "recipe": row.recipe.name,
                "departures": list(row.departures),
                "dataset": row.dataset,
                "model": model_name(row.recipe.settings),
                "rule": row.rule,
                "basis": row.basis,
                "num_planned": row.num_planned,
                "test_acc": row.test_acc and asdict(row.test_acc),
                "best_test_acc": row.best_test_acc and asdict(row.best_test_acc),
                **_cost_figures(row),
                "peak_activation_mib": row.peak_activation_mib,
                "step_time_ms": row.step_time_ms,
                "runs": [asdict(run) for run in row.runs],
            }
            for row in rows
        ],
    }


def write_table(plan: Plan, rows: Sequence[RowResult]) -> list[Path]:
    """Markdown, CSV, LaTeX and JSON, called as the plan is, in its directory. Returns the paths."""
    paths = [plan.out / f"{plan.name}.{each}" for each in _FORMATS]
    texts = (to_markdown(plan, rows), to_csv(rows), to_latex(plan, rows))
    for path, text in zip(paths, texts, strict=False):
        write_atomically(path, text.encode())
    write_json(paths[-1], to_record(plan, rows))
    return paths
