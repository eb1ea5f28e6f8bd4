"""`locallearn evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.data import Dataset
    from locallearn.engine import Evaluation, Trained

_SPLITS = ("test", "val", "train")
_MAX_CLASSES_AS_MATRIX = 20
_NUM_CONFUSIONS = 10


def evaluate(
    run: Annotated[
        str,
        typer.Argument(help="Run directory, checkpoint.pt or model.safetensors.", metavar="RUN"),
    ],
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data_dir: Annotated[
        str | None,
        typer.Option(help="Where the data is now, if it has moved.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    plot: Annotated[
        str | None,
        typer.Option(help="Write the confusion matrix as a picture.", metavar="FILE.png"),
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="Write all figures as JSON.", metavar="FILE.json")
    ] = None,
) -> None:
    """Accuracy, per-class accuracy and the confusion matrix of a trained network."""
    import torch

    from locallearn.engine import choose_device, load_trained
    from locallearn.engine import evaluate as evaluate_on
    from locallearn.engine.files import write_atomically, write_json
    from locallearn.engine.setup import evaluation_loader, recalibrate, training_loader

    if split not in _SPLITS:
        raise UserError(f"unknown split {split!r}. Valid: {', '.join(_SPLITS)}.")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}.")
    place = torch.device(choose_device(device))
    trained = load_trained(Path(run))
    dataset = _load_data(trained, data_dir)
    source = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[split]
    if source is None:
        raise UserError("the run held no validation images out (--val-split); use --split test.")
    learner = trained.learner.to(place)
    if trained.needs_recalibration:
        recalibrate(learner, training_loader(trained.config.settings, dataset, place))
    loader = evaluation_loader(source, dataset, batch_size, place)
    result = evaluate_on(learner, loader, len(trained.config.class_names))

    names = trained.config.class_names
    title = f"{trained.config.settings.model}, {trained.config.settings.rule}: {split} set"
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
                "loss": result.loss,
                "class_names": list(names),
                "class_accuracy": result.class_accuracy.tolist(),
                "confusion": result.confusion.tolist(),
            },
        )
        print(f"figures written to {json}")


def _load_data(trained: Trained, data_dir: str | None) -> Dataset:
    """The run's data, seen as the run's network was trained to see it."""
    from locallearn.engine.setup import load_data

    dataset = load_data(trained.config.settings, data_dir)
    if dataset.class_names != trained.config.class_names:
        raise UserError(
            f"the data has other classes than the network was trained on: "
            f"{', '.join(dataset.class_names)} instead of "
            f"{', '.join(trained.config.class_names)}."
        )
    return replace(dataset, inputs=trained.config.inputs)


def _print(
    result: Evaluation, names: tuple[str, ...], trained: Trained, split: str, num: int
) -> None:
    console = Console(highlight=False)
    where = f" after {trained.num_epochs} epochs" if trained.num_epochs is not None else ""
    console.print(
        f"{trained.origin}{where}: accuracy {result.accuracy:.2f} %, loss {result.loss:.4f} "
        f"on {num:,} {split} images",
        soft_wrap=True,
        markup=False,
    )
    counts, accuracy = result.confusion, result.class_accuracy
    if len(names) <= _MAX_CLASSES_AS_MATRIX:
        table = Table(title="true class by row, predicted by column", title_justify="left")
        table.add_column("class")
        table.add_column("accuracy", justify="right")
        for name in names:
            table.add_column(name[:6], justify="right")
        for i, name in enumerate(names):
            cells = [str(c) if c else "." for c in counts[i].tolist()]
            cells[i] = f"[bold]{cells[i]}[/bold]"
            table.add_row(name, f"{accuracy[i]:.2f} %", *cells)
        console.print(table)
        return
    table = Table(title="accuracy by class", title_justify="left")
    table.add_column("class")
    table.add_column("accuracy", justify="right")
    for i in accuracy.argsort().tolist():
        table.add_row(names[i], f"{accuracy[i]:.2f} %")
    console.print(table)
    wrong = counts.clone().fill_diagonal_(0)
    worst = wrong.flatten().argsort(descending=True)[:_NUM_CONFUSIONS].tolist()
    table = Table(title="most frequent confusions", title_justify="left")
    for heading in ("true", "predicted", "images"):
        table.add_column(heading)
    for place in worst:
        row, column = divmod(place, len(names))
        if wrong[row, column]:
            table.add_row(names[row], names[column], str(int(wrong[row, column])))
    console.print(table)
