"""A table of recipes, read from a TOML file: one row is one recipe.

    title = "LLS by basis"
    source = "paper, table"

    [defaults]                 # of every row; a row may say otherwise
    seeds = [0, 1, 2]
    rule = "lls"

    [[recipe]]
    name = "smallconv-mnist-square"
    dataset = "mnist"
    model = "smallconv"
    basis = "square"
    epochs = 100

Any setting of a training run may stand in a row, under the name that it has in config.json, apart
from those that belong to a machine and not to an experiment.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from locallearn.engine import TrainConfig
from locallearn.errors import UserError, unknown_name

_FOLDER = Path(__file__).parent
_SUFFIX = ".toml"

# Of the machine, or of a single run.
_NOT_OF_A_RECIPE = frozenset(
    {
        "backend",
        "cache",
        "cuda_graph",
        "data_dir",
        "device",
        "model_digest",
        "num_threads",
        "seed",
        "test_batch_size",
    }
)
_TYPES = typing.get_type_hints(TrainConfig)
_SETTINGS = frozenset(_TYPES) - _NOT_OF_A_RECIPE
_NEEDED = ("name", "dataset", "model", "rule", "epochs", "seeds")


@dataclass(frozen=True)
class Recipe:
    """A row of a table: one experiment, run once for each seed.

    Arguments:
        name: unique in its table; names a directory.
        settings: of a run, not resolved; the seed is set for each run.
        seeds: of the runs whose mean the table shows.
    """

    name: str
    settings: TrainConfig
    seeds: tuple[int, ...]

    @property
    def num_epochs(self) -> int:
        """Of the whole experiment."""
        assert self.settings.epochs is not None
        return self.settings.epochs


@dataclass(frozen=True)
class RecipeTable:
    """What a TOML file holds, or a part of it.

    Arguments:
        name: of the file, without its suffix.
        title, source: for people.
        recipes: the rows.
        num_in_file: rows of the whole table.
    """

    name: str
    title: str
    source: str
    recipes: tuple[Recipe, ...]
    num_in_file: int

    @property
    def is_part(self) -> bool:
        return len(self.recipes) < self.num_in_file

    def only(self, patterns: Iterable[str]) -> RecipeTable:
        """The recipes whose name matches one of the globs; all where there is none.

        Raises:
            UserError: a glob that matches none; lists the names.
        """
        patterns = tuple(patterns)
        names = [recipe.name for recipe in self.recipes]
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise unknown_name(f"recipe of {self.name}", pattern, names)
        kept = [
            recipe
            for recipe in self.recipes
            if not patterns or any(fnmatch(recipe.name, pattern) for pattern in patterns)
        ]
        return dataclasses.replace(self, recipes=tuple(kept))


def list_tables() -> list[str]:
    """Names of the tables that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}"))


def read_table(name: str) -> RecipeTable:
    """A table of the package by its name, or of the user's by the path of its TOML file.

    Raises:
        UserError: no such table; no TOML; or the first thing in it that is wrong, by row.
    """
    path = Path(name) if name.endswith(_SUFFIX) else _FOLDER / f"{name}{_SUFFIX}"
    if not name.endswith(_SUFFIX) and name not in list_tables():
        error = unknown_name("table", name, list_tables())
        raise UserError(f"{error} Or give the path of a {_SUFFIX} file of your own.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid TOML ({error}).") from error
    return _parse(content, path)


def _parse(content: dict[str, Any], path: Path) -> RecipeTable:
    odd = sorted(set(content) - {"title", "source", "defaults", "recipe"})
    if odd:
        raise UserError(
            f"{path}: unknown key {odd[0]!r}. Valid: title, source, defaults, recipe (a row)."
        )
    defaults, rows = content.get("defaults", {}), content.get("recipe", [])
    if not isinstance(defaults, dict) or "name" in defaults:
        raise UserError(f"{path}: [defaults] must be a table of settings, without a name.")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no recipe; write each as a [[recipe]].")
    recipes = [_recipe({**defaults, **row}, path, number) for number, row in enumerate(rows, 1)]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two recipes are called {name!r}; give each its own name.")
    title, source = content.get("title", path.stem), content.get("source", "")
    if not isinstance(title, str) or not isinstance(source, str):
        raise UserError(f"{path}: title and source must be text.")
    return RecipeTable(path.stem, title, source, tuple(recipes), len(recipes))


def _recipe(row: dict[str, Any], path: Path, number: int) -> Recipe:
    where = f"{path}, recipe {row.get('name', number)}"
    for key in _NEEDED:
        if key not in row:
            raise UserError(f"{where}: {key} is missing.")
    name, seeds = row.pop("name"), row.pop("seeds")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"{where}: name must be of letters, digits and . _ -, for it names a directory."
        )
    for key in row:
        if key in _NOT_OF_A_RECIPE:
            raise UserError(f"{where}: {key} belongs to a run or a machine, not to a recipe.")
        if key not in _SETTINGS:
            raise UserError(f"{where}: {unknown_name('setting', key, _SETTINGS)}")
        if not _fits(row[key], _TYPES[key]):
            kind = " or ".join(sorted(each.__name__ for each in _kinds(_TYPES[key])))
            raise UserError(f"{where}: {key} must be of type {kind}, got {row[key]!r}.")
    is_list = isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)
    if not is_list or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds must be a list of different whole numbers, got {seeds}.")
    settings = TrainConfig(**row)
    try:
        for seed in seeds:
            dataclasses.replace(settings, seed=seed, device="cpu", backend="autograd").resolve()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Recipe(name, settings, tuple(seeds))


def _kinds(annotation: Any) -> set[type]:
    """What a value of a setting may be, None apart, which TOML does not have."""
    return set(typing.get_args(annotation) or [annotation]) - {types.NoneType}


def _fits(value: Any, annotation: Any) -> bool:
    kinds = _kinds(annotation)
    return type(value) in kinds or (type(value) is int and float in kinds)
