"""`locallearn reproduce`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locallearn.cli.launching import check_is_alone
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.recipes import DatasetPlace, Plan

_TABLE, _DATA, _REHEARSAL, _COMPUTE = "Table", "Data", "Rehearsal", "Computation"
_FAILED = 2
_MAX_SEEDS = 1000


def _option(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def reproduce(
    table: Annotated[
        str,
        typer.Argument(help="table1, table2, table3, or a TOML file of recipes.", metavar="TABLE"),
    ],
    only: Annotated[
        str | None,
        _option("Recipes to run, by commas; * and ? stand for others. Default: all.", _TABLE),
    ] = None,
    seeds: Annotated[
        str | None,
        _option("Instead of the recipes' own, e.g. 0,1,2 or 0-4. Default: theirs.", _TABLE),
    ] = None,
    out: Annotated[
        str | None,
        _option("Directory of all the runs and of the result. Default: runs/TABLE.", _TABLE),
    ] = None,
    dry_run: Annotated[
        bool, _option("Show what there is and what would be run; run nothing.", _TABLE, "--dry-run")
    ] = False,
    dataset_dir: Annotated[
        str | None,
        _option("Where datasets are, or are downloaded to. Default: ~/.cache/locallearn.", _DATA),
    ] = None,
    dataset_map: Annotated[
        list[str] | None,
        _option(
            "NAME=DATASET[:DIR], e.g. cifar10=folder:my_images: another dataset in a recipe's "
            "stead. May be given several times.",
            _DATA,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        _option("Directory to keep decoded images in, for datasets of image files.", _DATA),
    ] = None,
    epochs_scale: Annotated[
        float,
        _option("Times the epochs, above 0 and at most 1; 0.05 makes 5 of 100.", _REHEARSAL),
    ] = 1.0,
    limit_train: Annotated[
        int | None, _option("Train on so many images at most.", _REHEARSAL, min=1)
    ] = None,
    limit_test: Annotated[
        int | None, _option("Test on so many images at most.", _REHEARSAL, min=1)
    ] = None,
    precision: Annotated[
        str | None, _option("fp32 or bf16. Default: the recipe's, fp32.", _REHEARSAL)
    ] = None,
    device: Annotated[str, _option("auto, cpu, cuda or mps. Default: auto.", _COMPUTE)] = "auto",
    jobs: Annotated[
        int,
        _option("Runs at a time, sharing the CPU's cores. Default: 1.", _COMPUTE, min=1),
    ] = 1,
) -> int:
    """Run a table of the paper, or one of your own: what is missing, and what was interrupted.

    What is done already is not run again. The result is written to the directory of the runs, as
    Markdown, CSV, LaTeX and JSON, whenever a run ends. A table that is shortened (fewer epochs,
    images or seeds) says so wherever it is written.
    """
    check_is_alone("reproduce")
    import torch

    from locallearn.cli.signals import noting_signals
    from locallearn.cli.table_view import make_view
    from locallearn.data.disk import only_one
    from locallearn.recipes import (
        Changes,
        Failed,
        Stopped,
        make_plan,
        read_table,
        run_cells,
    )

    wanted = [each.strip() for each in (only or "").split(",") if each.strip()]
    if only is not None and not wanted:
        raise UserError("--only is empty; name a recipe, or leave it out.")
    if out == "":
        raise UserError("--out is empty; give a directory, or leave it out.")
    recipes = read_table(table).only(wanted)
    changes = Changes(
        epochs_scale=epochs_scale,
        precision=precision,
        limit_train=limit_train,
        limit_test=limit_test,
        dataset_map=_parse_map(dataset_map or []),
        data_dir=dataset_dir,
        cache=cache,
        device=device,
        num_threads=max(1, torch.get_num_threads() // jobs),
    )
    path = Path(out) if out is not None else Path("runs") / recipes.name
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; give a directory.")
    plan = make_plan(recipes, changes, path, None if seeds is None else _parse_seeds(seeds))
    if dry_run:
        _print_plan(plan)
        return 0
    path.mkdir(parents=True, exist_ok=True)
    heard: list[int] = []
    with open(path / ".lock", "wb") as lock, noting_signals(heard.append):
        only_one(lock, f"--out {path} is being filled")
        with make_view(plan, num_jobs=jobs) as view:
            outcomes = run_cells(
                plan.cells, num_jobs=jobs, listener=view, should_stop=lambda: bool(heard)
            )
        paths = view.finish()
    print(f"written to {', '.join(str(each) for each in paths)}")
    failed = {cell: each for cell, each in outcomes.items() if isinstance(each, Failed)}
    for cell, failure in failed.items():
        print(f"Error: {cell.name}: {failure.message}", file=sys.stderr)
    if heard or any(isinstance(outcome, Stopped) for outcome in outcomes.values()):
        print("Stopped; all is saved. The same command goes on from here.", file=sys.stderr)
        return 128 + (heard[0] if heard else signal.SIGTERM)
    return _FAILED if failed else 0


def _parse_seeds(text: str) -> list[int]:
    """ "0,2-4" as [0, 2, 3, 4]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise UserError(f"--seeds {text!r} is no list of seeds such as 0,1,2 or 0-4.") from None
        if high < low or low < 0:
            raise UserError(f"--seeds {text!r}: {part.strip()} is empty; give the smaller first.")
        if high - low >= _MAX_SEEDS:
            raise UserError(f"--seeds {text!r}: {part.strip()} is more than {_MAX_SEEDS} seeds.")
        seeds += [seed for seed in range(low, high + 1) if seed not in seeds]
    return seeds


def _parse_map(pairs: list[str]) -> dict[str, DatasetPlace]:
    from locallearn.data import dataset_spec
    from locallearn.recipes import DatasetPlace

    places = {}
    for pair in pairs:
        name, equals, place = pair.partition("=")
        dataset, colon, directory = place.partition(":")
        if not (name and equals and dataset) or (colon and not directory):
            raise UserError(
                f"--dataset-map {pair!r}: expected NAME=DATASET or NAME=DATASET:DIR, "
                f"e.g. cifar10=folder:my_images."
            )
        dataset_spec(name)
        if dataset_spec(dataset).needs_data_dir and not directory:
            raise UserError(f"--dataset-map {pair!r}: {dataset} needs a directory, {dataset}:DIR.")
        if name in places:
            raise UserError(f"--dataset-map: {name} is mapped twice.")
        places[name] = DatasetPlace(dataset, directory or None)
    return places


def _print_plan(plan: Plan) -> None:
    """Each run, whether it is there, and the command that makes it."""
    from locallearn.engine.config import train_command
    from locallearn.recipes import CellState, rehearsal_lines

    states = [cell.state() for cell in plan.cells]
    for line in rehearsal_lines(plan):
        print(f"rehearsal: {line}")
    for cell, state in zip(plan.cells, states, strict=True):
        print(f"{state.value:8} {cell.path}")
        print(f"         {train_command(cell.settings)}")
    counts = ", ".join(f"{states.count(state)} {state.value}" for state in CellState)
    print(f"{len(states)} {'run' if len(states) == 1 else 'runs'}: {counts}")
