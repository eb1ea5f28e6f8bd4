"""A table of results as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from locallearn.analysis import Cost, MeanStd
from locallearn.engine.files import write_atomically, write_json
from locallearn.recipes.plan import Plan
from locallearn.recipes.results import RowResult, record

_NOTHING = "-"
_REHEARSAL = "A rehearsal, not the paper's experiment:"
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
    _Column("dataset", lambda row: row.dataset, is_number=False),
    _Column("model", lambda row: row.recipe.settings.model, is_number=False),
    _Column("rule", lambda row: row.rule, is_number=False),
    _Column("basis", lambda row: _basis(row) or _NOTHING, is_number=False),
    _Column("accuracy, %", lambda row: _spread(row.test_acc)),
    _Column("best, %", lambda row: _spread(row.best_test_acc)),
    _Column("runs", lambda row: str(len(row.runs))),
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


def _basis(row: RowResult) -> str | None:
    basis = row.recipe.settings.build_rule().options().get("basis")
    return None if basis is None else str(basis)


def _caption(plan: Plan) -> str:
    source = f" ({plan.table.source})" if plan.table.source else ""
    return f"{plan.table.title}{source}"


def rehearsal_lines(plan: Plan) -> list[str]:
    """How the runs depart from the recipes, a line each; empty where they do not."""
    names: dict[str, list[str]] = {}
    for recipe in plan.table.recipes:
        seeds = tuple(cell.seed for cell in plan.of(recipe))
        words = list(plan.departures.get(recipe.name, ()))
        if seeds != recipe.seeds:
            kind = "seed" if len(seeds) == 1 else "seeds"
            words.append(f"{kind} {', '.join(map(str, seeds))} of {len(recipe.seeds)}")
        if words:
            names.setdefault("; ".join(words), []).append(recipe.name)
    is_of_all = [len(each) == len(plan.table.recipes) for each in names.values()]
    return [
        words if of_all else f"{words} ({', '.join(names[words])})"
        for words, of_all in zip(names, is_of_all, strict=True)
    ]


def to_markdown(plan: Plan, rows: Sequence[RowResult]) -> str:
    """Caption, how it departs from the paper, the table, its legend, and every run's command."""
    lines = [f"## {_caption(plan)}", ""]
    if departures := rehearsal_lines(plan):
        lines += [f"**{_REHEARSAL}** {'; '.join(departures)}.", ""]
    lines.append("| " + " | ".join(column.heading for column in _COLUMNS) + " |")
    lines.append("|" + "|".join("---:" if column.is_number else "---" for column in _COLUMNS) + "|")
    for row in rows:
        lines.append("| " + " | ".join(column.cell(row) for column in _COLUMNS) + " |")
    lines += ["", _LEGEND, ""]
    made = [row for row in rows if row.runs]
    if made:
        lines += ["Each cell's runs were made by these commands (one for each seed):", ""]
        for row in made:
            seeds = ", ".join(f"{run.seed}: {run.test_acc:.2f} %" for run in row.runs)
            lines += [f"- `{row.runs[0].command}`", f"  (seed {seeds})"]
        lines.append("")
        lines += [f"- {line}" for line in _where(rows)]
        lines.append("")
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


def to_csv(plan: Plan, rows: Sequence[RowResult]) -> str:
    """A line for each row, all figures in full."""
    text = io.StringIO()
    fields = [
        "recipe", "dataset", "model", "rule", "basis", "departure", "num_runs", "seeds",
        "test_acc_mean", "test_acc_std", "best_test_acc_mean", "best_test_acc_std",
        "learning_signal_macs", "bp_learning_signal_macs", "total_macs", "peak_activation_mib",
        "num_params", "num_additional_params", "step_time_ms", "commands",
    ]  # fmt: skip
    writer = csv.DictWriter(text, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        acc, best, cost = row.test_acc, row.best_test_acc, row.cost
        writer.writerow(
            {
                "recipe": row.recipe.name,
                "dataset": row.dataset,
                "model": row.recipe.settings.model,
                "rule": row.rule,
                "basis": _basis(row),
                "departure": "; ".join(plan.departures.get(row.recipe.name, ())),
                "num_runs": len(row.runs),
                "seeds": " ".join(str(run.seed) for run in row.runs),
                "test_acc_mean": acc and acc.mean,
                "test_acc_std": acc and acc.std,
                "best_test_acc_mean": best and best.mean,
                "best_test_acc_std": best and best.std,
                "learning_signal_macs": cost and cost.learning_signal_macs,
                "bp_learning_signal_macs": row.bp_signal_macs,
                "total_macs": cost and cost.total_macs,
                "peak_activation_mib": row.peak_activation_mib,
                "num_params": cost and cost.num_params,
                "num_additional_params": cost and cost.num_additional_params,
                "step_time_ms": row.step_time_ms,
                "commands": "; ".join(run.command for run in row.runs),
            }
        )
    return text.getvalue()


def to_latex(plan: Plan, rows: Sequence[RowResult]) -> str:
    """A table environment; its document needs the package booktabs."""
    caption = _latex(_caption(plan) + ".")
    if departures := rehearsal_lines(plan):
        caption += rf" \textbf{{{_REHEARSAL}}} {_latex('; '.join(departures))}."
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{plan.table.name}}}",
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
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
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


def write_table(plan: Plan, rows: Sequence[RowResult]) -> list[Path]:
    """TABLE.md, .csv, .tex and .json in the plan's directory. Returns their paths."""
    paths = [plan.out / f"{plan.table.name}.{each}" for each in _FORMATS]
    for path, make in zip(paths, (to_markdown, to_csv, to_latex), strict=False):
        write_atomically(path, make(plan, rows).encode())
    write_json(paths[-1], record(plan, rows))
    return paths
