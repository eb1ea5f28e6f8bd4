"""What the runs of a table came to: accuracy over the seeds, and what a step costs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locallearn.analysis import Cost, MeanStd, run_cost
from locallearn.analysis.measured import read_peak_mib
from locallearn.engine import RunConfig, RunDirectory
from locallearn.engine.config import rule_options, train_command
from locallearn.errors import UserError
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
    backend: str
    num_threads: int
    command: str
    environment: dict[str, Any]

    @property
    def place(self) -> tuple[str, str, int]:
        """Step times are of one kind only where this is the same."""
        return self.environment["device_name"], self.backend, self.num_threads


@dataclass(frozen=True)
class RowResult:
    """A row of a table.

    Arguments:
        recipe: which.
        departures: how its runs depart from it, a phrase each.
        dataset: the recipe's, and what stood in for it.
        rule: with those of its options that are not the defaults.
        basis: of the rule; None where it has none.
        num_planned: runs that the row is to have.
        runs: those with results, by seed; may be empty, and the fields below are then None.
        cost: of a training step, counted; None where it can't be.
        bp_signal_macs: of backpropagation's learning signal in the same network, for each sample.
        peak_activation_mib: of a step, measured; None where it was not.
    """

    recipe: Recipe
    departures: tuple[str, ...]
    dataset: str
    rule: str
    basis: str | None
    num_planned: int
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
        """Median over the runs, of each its median over epochs; None where they ran on unlike
        devices, backends or numbers of threads."""
        if len({run.place for run in self.runs}) != 1:
            return None
        return statistics.median(run.step_time_ms for run in self.runs)


def collect(plan: Plan) -> list[RowResult]:
    """The rows of a table, from what lies in its directories now.

    Raises:
        UserError: runs of a recipe that saw different data, or with other settings than planned.
    """
    return [_row(plan, recipe) for recipe in plan.table.recipes]


def _row(plan: Plan, recipe: Recipe) -> RowResult:
    cells = plan.of(recipe)
    done = [cell for cell in cells if cell.state() is CellState.DONE]
    configs = [RunDirectory(cell.path).read_config() for cell in done]
    _check_same_data(done, configs)
    settings = recipe.settings
    place = plan.changes.dataset_map.get(settings.dataset)
    rule = settings.build_rule()
    basis = rule.options().get("basis")
    row = RowResult(
        recipe=recipe,
        departures=plan.departures(recipe),
        dataset=settings.dataset + (f" ({place.dataset})" if place else ""),
        rule=":".join([rule.name, *(f"{k}={v}" for k, v in rule_options(settings).items())]),
        basis=None if basis is None else str(basis),
        num_planned=len(cells),
        runs=tuple(_run(*pair) for pair in zip(done, configs, strict=True)),
    )
    if not done:
        return row
    row = dataclasses.replace(row, peak_activation_mib=read_peak_mib(done[0].path))
    if settings.group_blocks > 1 or settings.head_after_pool:
        return row  # of these, costs are not counted
    bp_cost = run_cost(configs[0], build_rule("bp"))
    return dataclasses.replace(
        row,
        cost=run_cost(configs[0]),
        bp_signal_macs=None if bp_cost is None else bp_cost.learning_signal_macs,
    )


def _check_same_data(cells: Sequence[Cell], configs: Sequence[RunConfig]) -> None:
    for cell, config in zip(cells, configs, strict=True):
        if config.data["fingerprint"] != configs[0].data["fingerprint"]:
            raise UserError(
                f"{cell.path} was trained or tested on other data than {cells[0].path}. Choose "
                f"another --out, or remove one of them."
            )


def _run(cell: Cell, config: RunConfig) -> RunResult:
    summary = RunDirectory(cell.path).read_summary()
    assert summary is not None
    # The data's place as it was given, for a command that fits other machines too; a cache changes
    # nothing that is computed.
    given = cell.settings.data_dir
    is_there = given is not None and cell.settings.resolve().data_dir == config.settings.data_dir
    settings = dataclasses.replace(
        config.settings, data_dir=given if is_there else config.settings.data_dir, cache=None
    )
    assert settings.num_threads is not None
    return RunResult(
        seed=cell.seed,
        test_acc=summary["test_acc"],
        best_test_acc=summary["best_test_acc"],
        test_acc_per_epoch=summary["test_acc_per_epoch"],
        step_time_ms=summary["step_time_ms_median"],
        backend=settings.backend,
        num_threads=settings.num_threads,
        command=train_command(settings),
        environment=config.environment,
    )
