"""`locallearn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.cli.exits import ExitOptions, evaluate_exits
from locallearn.cli.options import (
    BatchSizeOption,
    CacheOption,
    DataDirOption,
    DeviceOption,
    WeightsArgument,
)
from locallearn.cli.run_data import load_run, load_run_data
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.engine import Evaluation, Trained

_SPLITS = ("test", "val", "train")
_MAX_CLASSES_AS_MATRIX = 20
_NUM_CONFUSIONS = 10


def evaluate(
    run: WeightsArgument,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    early_exit: Annotated[
        bool,
        typer.Option(
            "--early-exit",
            help="Look at the blocks' heads as early exits instead: accuracy against cost, "
            "calibration, time. Writes exits.json into the run directory.",
        ),
    ] = False,
    exit_threshold: Annotated[
        float | None,
        typer.Option(
            help="--early-exit: probability at which images leave. Default: the cheapest that "
            "loses no more than --max-drop on the held-out images.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(help="--early-exit: accuracy that may be lost, percentage points."),
    ] = 0.5,
    exits: Annotated[
        str | None,
        typer.Option(
            help="--early-exit: blocks at which images may leave, by commas. Default: all.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    plot: Annotated[
        str | None,
        typer.Option(
            help="Write the confusion matrix (or the exits' curve) as a picture.",
            metavar="FILE.png",
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="Write all figures as JSON.", metavar="FILE.json")
    ] = None,
) -> None:
    """Accuracy, per-class accuracy and the confusion matrix of a trained network; or, with
    --early-exit, what its blocks' heads save as early exits."""
    import torch

    from locallearn.engine import choose_device
    from locallearn.engine import evaluate as evaluate_on
    from locallearn.engine.allocator import keep_freed_memory
    from locallearn.engine.building import evaluation_loader, recalibrate, training_loader
    from locallearn.engine.config import model_name
    from locallearn.engine.files import check_target, write_atomically, write_json

    if split not in _SPLITS:
        raise UserError(f"unknown split {split!r}. Valid: {', '.join(_SPLITS)}.")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}.")
    for given, name in ((plot, "--plot"), (json, "--json")):
        if given is not None:
            check_target(Path(given), name)
    if early_exit and split != "test":
        raise UserError("--early-exit looks at the test images; leave out --split.")
    if not early_exit and (exit_threshold is not None or exits is not None):
        raise UserError("--exit-threshold and --exits are for --early-exit.")
    keep_freed_memory()
    place = torch.device(choose_device(device))
    trained = load_run(run)
    dataset = load_run_data(trained, data_dir, cache)
    source = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[split]
    if source is None:
        raise UserError("the run held no validation images out (--val-split); use --split test.")
    learner = trained.learner.to(place)
    if trained.needs_recalibration:
        recalibrate(learner, training_loader(trained.config.settings, dataset, place))
    if early_exit:
        options = ExitOptions(exit_threshold, max_drop, exits, batch_size)
        evaluate_exits(trained, Path(run), dataset, place, options, plot, json)
        return
    loader = evaluation_loader(source, dataset, batch_size, place)
    result = evaluate_on(learner, loader, len(trained.config.class_names))

    names = trained.config.class_names
    settings = trained.config.settings
    title = f"{model_name(settings)}, {settings.rule}: {split} set"
    _print(result, names, trained, split, len(source))
    if plot is not None:
        from locallearn.analysis import plot_confusion

        target = Path(plot)
        write_atomically(target, plot_confusion(result.confusion, names, title, target))
        print(f"confusion matrix written to {target}")
    if json is not None:
        write_json(
            Path(json),
            {
                "run": str(trained.origin),
                "split": split,
                "num_images": len(source),
                "accuracy": result.accuracy,
                "balanced_accuracy": result.balanced_accuracy,
                "loss": result.loss,
                "class_names": list(names),
                "class_accuracy": result.class_accuracy.tolist(),
                "confusion": result.confusion.tolist(),
            },
        )
        print(f"figures written to {json}")


def _print(
    result: Evaluation, names: tuple[str, ...], trained: Trained, split: str, num: int
) -> None:
    where = f" after {trained.num_epochs} epochs" if trained.num_epochs is not None else ""
    print(
        f"{trained.origin}{where}: accuracy {result.accuracy:.2f} %, balanced accuracy "
        f"{result.balanced_accuracy:.2f} %, loss {result.loss:.4f} on {num:,} {split} images"
    )
    counts = result.confusion
    totals, accuracy = counts.sum(dim=1).tolist(), result.class_accuracy.tolist()
    table = Table(title="accuracy by class", title_justify="left")
    for heading in ("", "class", "images", "accuracy"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for i, name in enumerate(names):
        table.add_row(
            str(i), escape(name), f"{totals[i]:,}", f"{accuracy[i]:.2f} %" if totals[i] else "-"
        )
    console = Console(highlight=False)
    console.print(table)
    if len(names) <= _MAX_CLASSES_AS_MATRIX:
        for line in _matrix_lines(counts.tolist(), names):
            print(line)
        return
    wrong = counts.clone().fill_diagonal_(0)
    worst = wrong.flatten().argsort(descending=True)[:_NUM_CONFUSIONS].tolist()
    table = Table(title="most frequent confusions", title_justify="left")
    for heading in ("true", "predicted", "images"):
        table.add_column(heading)
    for place in worst:
        row, column = divmod(place, len(names))
        if wrong[row, column]:
            table.add_row(escape(names[row]), escape(names[column]), str(int(wrong[row, column])))
    console.print(table)


def _matrix_lines(counts: list[list[int]], names: tuple[str, ...]) -> list[str]:
    """The confusion matrix in columns just wide enough, which a table of rich's would squeeze."""
    cell = 1 + max(len(str(count)) for row in counts for count in row)
    margin = max(len(f"{i} {name}") for i, name in enumerate(names))
    lines = ["images of each true class (row) by predicted class (column)"]
    lines.append(" " * margin + "".join(f"{i:{cell}}" for i in range(len(names))))
    for i, (row, name) in enumerate(zip(counts, names, strict=True)):
        label = f"{i:{len(str(len(names) - 1))}} {name}"
        lines.append(f"{label:{margin}}" + "".join(f"{count or '.':>{cell}}" for count in row))
    return lines
