"""What is to be run: every recipe with every seed, where each lies, and which are there already."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from locallearn.data import dataset_spec
from locallearn.engine import RunDirectory, TrainConfig
from locallearn.engine.building import check_model
from locallearn.engine.config import setting_name
from locallearn.errors import UserError
from locallearn.recipes.recipe import Recipe, RecipeTable

# Of an existing run: where its data lies and what it is computed with may differ from the plan.
_OF_THE_MACHINE = frozenset({"data_dir", "cache", "device", "backend", "num_threads", "cuda_graph"})


@dataclass(frozen=True)
class DatasetPlace:
    """Where a recipe's dataset is taken from: another registered one, and its directory."""

    dataset: str
    data_dir: str | None


@dataclass(frozen=True)
class Changes:
    """What a user changes in every recipe. The first five make another experiment of it.

    Arguments:
        epochs_scale: times the epochs; at least one is left.
        precision: None for the recipe's.
        limit_train, limit_test: images at most; None for the recipe's.
        dataset_map: recipe's dataset -> what stands in for it, such as a folder of its images.
        data_dir: of the datasets that are not mapped.
        cache: directory of decoded images, for the datasets that can have one.
        device: as `locallearn train`'s.
        num_threads: CPU threads of each run.

    Raises:
        UserError: a number out of range.
    """

    epochs_scale: float = 1.0
    precision: str | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    dataset_map: dict[str, DatasetPlace] = field(default_factory=dict)
    data_dir: str | None = None
    cache: str | None = None
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.epochs_scale <= 1:
            raise UserError(
                f"--epochs-scale must be above 0 and at most 1, got {self.epochs_scale}."
            )

    def apply(self, recipe: Recipe, seed: int) -> TrainConfig:
        """The settings of a run, not resolved."""
        settings = recipe.settings
        place = self.dataset_map.get(settings.dataset)
        dataset = place.dataset if place else settings.dataset
        shortened = {
            name: value
            for name in ("precision", "limit_train", "limit_test")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            settings,
            **shortened,
            dataset=dataset,
            data_dir=place.data_dir if place and place.data_dir else self.data_dir,
            cache=self.cache if dataset_spec(dataset).can_cache else None,
            epochs=max(1, round(self.epochs_scale * recipe.num_epochs)),
            device=self.device,
            num_threads=self.num_threads,
            seed=seed,
        )


@dataclass(frozen=True)
class Departure:
    """How a run departs from its recipe: shorter, on other or fewer images, in another precision.

    Attributes:
        words: a phrase for each, for people; empty for a run as the recipe has it.
        folder: the same as a directory's name, the epochs always among it.
    """

    words: tuple[str, ...]
    folder: str

    @classmethod
    def of(cls, recipe: Recipe, settings: TrainConfig) -> Departure:
        words, parts = [], [f"{settings.epochs}-epochs"]
        if settings.epochs != recipe.num_epochs:
            words.append(f"{settings.epochs} of {recipe.num_epochs} epochs")
        if settings.dataset != recipe.settings.dataset:
            words.append(
                f"{settings.dataset} for {recipe.settings.dataset}, normalised and augmented as "
                f"{settings.dataset} is"
            )
            parts.append(settings.dataset)
        for name, what in (("limit_train", "train"), ("limit_test", "test")):
            number = getattr(settings, name)
            if number != getattr(recipe.settings, name):
                words.append(f"{number:,} {what} images")
                parts.append(f"{number}-{what}")
        if settings.precision != recipe.settings.precision:
            words.append(settings.precision)
            parts.append(settings.precision)
        return cls(tuple(words), "-".join(parts))


class CellState(enum.Enum):
    """missing: nothing there; started: a run that can be resumed; done: a run with results."""

    MISSING = "missing"
    STARTED = "started"
    DONE = "done"


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Arguments:
        recipe: which.
        settings: of this run, not resolved.
        path: its run directory.
    """

    recipe: Recipe
    settings: TrainConfig
    path: Path

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def name(self) -> str:
        return f"{self.recipe.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of all runs of its recipe that depart from it alike."""
        return self.path.parent

    def state(self) -> CellState:
        """What lies in its directory.

        Raises:
            UserError: a run with other settings; names them.
        """
        run = RunDirectory(self.path)
        if not run.config_path.exists():
            return CellState.MISSING
        ours, theirs = self.settings.resolve().to_json(), run.read_config().settings.to_json()
        differing = [
            f"{setting_name(self.settings, name)} (there: {theirs[name]}, recipe: {ours[name]})"
            for name in ours
            if name not in _OF_THE_MACHINE and ours[name] != theirs[name]
        ]
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(differing)}. "
                f"Choose another --out, or remove it."
            )
        return CellState.DONE if run.is_finished else CellState.STARTED


@dataclass(frozen=True)
class Plan:
    """The runs of a table.

    Arguments:
        table: what of it is run.
        changes: made in every recipe.
        out: directory of all the runs.
        cells: in the order in which they are run: all recipes with their first seed, then with
            the second, so that a table that is stopped early has a row for each.
    """

    table: RecipeTable
    changes: Changes
    out: Path
    cells: tuple[Cell, ...]

    def of(self, recipe: Recipe) -> list[Cell]:
        """A recipe's runs, by seed."""
        return [cell for cell in self.cells if cell.recipe is recipe]

    def departures(self, recipe: Recipe) -> tuple[str, ...]:
        """How its runs depart from a recipe, a phrase each; empty where they do not."""
        cells = self.of(recipe)
        words = Departure.of(recipe, cells[0].settings).words
        seeds, own = {cell.seed for cell in cells}, set(recipe.seeds)
        if seeds == own:
            return words
        listed = ", ".join(str(cell.seed) for cell in cells)
        if seeds < own:
            return (*words, f"{len(seeds)} of {len(own)} seeds: {listed}")
        return (*words, f"seeds {listed} instead of {', '.join(map(str, recipe.seeds))}")

    @property
    def name(self) -> str:
        """Of the files of its result: only the whole table, as it is written, has the table's."""
        if any(self.departures(recipe) for recipe in self.table.recipes):
            return f"{self.table.name}-rehearsal"
        return f"{self.table.name}-part" if self.table.is_part else self.table.name


def make_plan(
    table: RecipeTable, changes: Changes, out: Path, seeds: Sequence[int] | None = None
) -> Plan:
    """The runs of a table.

    Arguments:
        table: with the recipes to run.
        changes: made in every recipe.
        out: RECIPE/DEPARTURE/seed-N is made in it for each run.
        seeds: instead of the recipes' own.

    Raises:
        UserError: a setting that does not go with a recipe, or a model that is not there, by the
            recipe's name; a mapped dataset that is in no recipe.
    """
    used = {recipe.settings.dataset for recipe in table.recipes}
    for name in changes.dataset_map:
        if name not in used:
            raise UserError(
                f"--dataset-map {name}: no recipe of the table uses it. "
                f"Its datasets: {', '.join(sorted(used))}."
            )
    cells = []
    for recipe in table.recipes:
        for rank, seed in enumerate(recipe.seeds if seeds is None else seeds):
            settings = changes.apply(recipe, seed)
            try:
                check_model(settings.resolve())
            except UserError as error:
                raise UserError(f"recipe {recipe.name}: {error}") from error
            folder = Departure.of(recipe, settings).folder
            path = out / recipe.name / folder / f"seed-{seed}"
            cells.append((rank, Cell(recipe, settings, path)))
    cells.sort(key=lambda pair: pair[0])  # stable: within a seed in the table's order
    return Plan(table, changes, out, tuple(cell for _, cell in cells))
