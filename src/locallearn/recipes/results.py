"""What the runs of a table came to: accuracy over the seeds, and what a step costs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from locallearn.analysis import Cost, MeanStd, run_cost
from locallearn.analysis.measured import read_peak_mib, step_path
from locallearn.engine import RunDirectory
from locallearn.engine.building import build_learner
from locallearn.engine.config import train_command
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json
from locallearn.engine.graphs import NUM_WARM_UP_STEPS
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.recipes.plan import Cell, CellState, Plan
from locallearn.recipes.recipe import Recipe
from locallearn.rules import build_rule


@dataclass(frozen=True)
class RunResult:
    """One run: its seed, results, the command that made it, and where and with what it ran."""

    seed: int
    test_acc: float
    best_test_acc: float
    test_acc_per_epoch: list[float]
    step_time_ms: float
    command: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class RowResult:
    """A row of a table.

    Arguments:
        recipe: which.
        dataset: the recipe's, and what stood in for it.
        rule: with those of its options that are not the defaults.
        runs: those with results, by seed; may be empty, and the fields below are then None.
        cost: of a training step, counted.
        bp_signal_macs: of backpropagation's learning signal in the same network, for each sample.
        peak_activation_mib: of a step, measured; None where it was not.
    """

    recipe: Recipe
    dataset: str
    rule: str
    runs: tuple[RunResult, ...]
    cost: Cost | None = None
    bp_signal_macs: int | None = None
    peak_activation_mib: float | None = None

    @property
    def test_acc(self) -> MeanStd | None:
        """Percent, after the last epoch."""
        return MeanStd.of([run.test_acc for run in self.runs]) if self.runs else None

    @property
    def best_test_acc(self) -> MeanStd | None:
        """Percent, after the epoch that was best on the test set, as the authors report it."""
        return MeanStd.of([run.best_test_acc for run in self.runs]) if self.runs else None

    @property
    def step_time_ms(self) -> float | None:
        """Median over the runs, of each its median over epochs."""
        return statistics.median(run.step_time_ms for run in self.runs) if self.runs else None


def collect(plan: Plan) -> list[RowResult]:
    """The rows of a table, from what lies in its directories now."""
    return [_row(plan, recipe) for recipe in plan.table.recipes]


def _row(plan: Plan, recipe: Recipe) -> RowResult:
    cells = plan.of(recipe)
    done = [cell for cell in cells if cell.state() is CellState.DONE]
    place = plan.changes.dataset_map.get(recipe.settings.dataset)
    dataset = recipe.settings.dataset + (f" ({place.dataset})" if place else "")
    rule = _rule_label(recipe)
    if not done:
        return RowResult(recipe, dataset, rule, ())
    config = RunDirectory(done[0].path).read_config()
    return RowResult(
        recipe,
        dataset,
        rule,
        tuple(sorted((_run(cell) for cell in done), key=lambda run: run.seed)),
        run_cost(config),
        run_cost(config, build_rule("bp")).learning_signal_macs,
        read_peak_mib(done[0].path),
    )


def _run(cell: Cell) -> RunResult:
    run = RunDirectory(cell.path)
    config, summary = run.read_config(), run.read_summary()
    assert summary is not None
    # The data's place as it was given, for a command that fits other machines too.
    settings = dataclasses.replace(cell.settings, num_threads=config.settings.num_threads)
    return RunResult(
        seed=cell.seed,
        test_acc=summary["test_acc"],
        best_test_acc=summary["best_test_acc"],
        test_acc_per_epoch=summary["test_acc_per_epoch"],
        step_time_ms=summary["step_time_ms_median"],
        command=train_command(settings),
        environment=config.environment,
    )


def _rule_label(recipe: Recipe) -> str:
    rule = recipe.settings.build_rule()
    usual = build_rule(rule.name).options()
    options = [
        f"{name}={value}"
        for name, value in rule.options().items()
        if value != usual[name] and name not in ("basis", "setting")
    ]
    return ":".join([rule.name, *options])


# -- peak memory, measured ----------------------------------------------------------------------


def unmeasured(plan: Plan) -> list[Cell]:
    """A finished run of each recipe whose step's memory was not measured yet."""
    found = []
    for recipe in plan.table.recipes:
        done = [cell for cell in plan.of(recipe) if cell.state() is CellState.DONE]
        if done and read_peak_mib(done[0].path) is None:
            found.append(done[0])
    return found


def measure(cell: Cell) -> None:
    """Measure what a step of such a run holds at most, on noise; write it beside the runs."""
    config = RunDirectory(cell.path).read_config()
    settings, inputs = config.settings, config.inputs
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    learner = build_learner(
        settings, inputs, len(config.class_names), device=device, compile=settings.compile
    )
    images = torch.randn(settings.batch_size, inputs.num_channels, *inputs.image_size)
    labels = torch.arange(settings.batch_size) % len(config.class_names)
    images, labels = images.to(device), labels.to(device)
    for _ in range(NUM_WARM_UP_STEPS):  # allocate the optimizer's state, and compile
        learner.step(images, labels)
    peak = peak_memory_bytes(lambda: learner.step(images, labels), device)
    write_json(
        step_path(cell.path),
        {"peak_activation_mib": peak / 2**20, "environment": describe_environment(settings.device)},
    )


def record(plan: Plan, rows: Sequence[RowResult]) -> dict[str, Any]:
    """All of it, for a JSON file."""
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "source": plan.table.source,
        "departures": plan.departures,
        "rows": [
            {
                "recipe": row.recipe.name,
                "dataset": row.dataset,
                "model": row.recipe.settings.model,
                "rule": row.rule,
                "basis": row.recipe.settings.build_rule().options().get("basis"),
                "test_acc": row.test_acc and asdict(row.test_acc),
                "best_test_acc": row.best_test_acc and asdict(row.best_test_acc),
                "cost": row.cost and asdict(row.cost),
                "bp_learning_signal_macs": row.bp_signal_macs,
                "peak_activation_mib": row.peak_activation_mib,
                "step_time_ms": row.step_time_ms,
                "runs": [asdict(run) for run in row.runs],
            }
            for row in rows
        ],
    }
