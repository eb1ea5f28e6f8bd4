"""`locallearn predict`."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.cli.options import DeviceOption, WeightsArgument
from locallearn.cli.run_data import load_run
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.engine import Trained


def predict(
    run: WeightsArgument,
    images: Annotated[list[str], typer.Argument(help="Image files.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option(help="How many classes to show for each image.")] = 1,
    exit_threshold: Annotated[
        str | None,
        typer.Option(
            help="Stop at the first block that is so sure of an image, a probability; auto: the "
            "threshold that `evaluate RUN --early-exit` chose. Default: the whole network.",
            show_default=False,
            metavar="P|auto",
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Class and probability for image files."""
    import torch

    from locallearn.data import read_for_prediction
    from locallearn.engine import choose_device

    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}.")
    place = torch.device(choose_device(device))
    trained = load_run(run)
    trained.check_statistics(run)
    names = trained.config.class_names
    learner = trained.learner.to(place)
    batches = read_for_prediction([Path(image) for image in images], trained.config.inputs)
    threshold = _threshold(trained, run, exit_threshold)
    answered = [learner.predict(batch.to(place), exit_threshold=threshold) for batch in batches]
    probabilities = torch.cat([part.probabilities.cpu() for part in answered])
    left_at = [part.exit_names[place] for part in answered for place in part.exits.tolist()]
    values, classes = probabilities.topk(min(top, len(names)), dim=1)

    answers = [
        {
            "image": image,
            "predictions": [
                {"class": names[c], "probability": p}
                for c, p in zip(row_classes, row_values, strict=True)
            ],
        }
        | ({} if threshold is None else {"exit": exit_name})
        for image, row_classes, row_values, exit_name in zip(
            images, classes.tolist(), values.tolist(), left_at, strict=True
        )
    ]
    if json:
        print(json_module.dumps(answers, indent=2))
        return
    table = Table()
    headings = ["image", "class", "probability"] + ([] if threshold is None else ["left at"])
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for image, row_classes, row_values, exit_name in zip(
        images, classes.tolist(), values.tolist(), left_at, strict=True
    ):
        for rank, (c, p) in enumerate(zip(row_classes, row_values, strict=True)):
            cells = ["" if rank else escape(image), escape(names[c]), f"{100 * p:.2f} %"]
            if threshold is not None:
                cells.append("" if rank else escape(exit_name))
            table.add_row(*cells)
    Console(highlight=False).print(table)


def _threshold(trained: Trained, run: str, given: str | None) -> float | None:
    """The exit threshold as given, the exits' temperatures loaded; None of none.

    Raises:
        UserError: no probability, or none was chosen for the run as it is now.
    """
    from locallearn.engine.weights import load_exits

    if given is None:
        return None
    record = load_exits(trained, Path(run))
    if given == "auto":
        if record is None:
            raise UserError(
                f"no threshold was chosen for {run} with these weights: run `locallearn evaluate "
                f"{run} --early-exit`, or give a probability as --exit-threshold."
            )
        return record.threshold
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(f"--exit-threshold must be in [0, 1] or auto, got {given!r}.")
    return value
