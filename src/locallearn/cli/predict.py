"""`locallearn predict`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.cli.options import DeviceOption, WeightsArgument
from locallearn.cli.run_data import load_run
from locallearn.errors import UserError


def predict(
    run: WeightsArgument,
    images: Annotated[list[str], typer.Argument(help="Image files.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option(help="How many classes to show for each image.")] = 1,
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
    logits = torch.cat([learner(batch.to(place)).cpu() for batch in batches])
    probabilities = logits.softmax(dim=1)
    values, classes = probabilities.topk(min(top, len(names)), dim=1)

    answers = [
        {
            "image": image,
            "predictions": [
                {"class": names[c], "probability": p}
                for c, p in zip(row_classes, row_values, strict=True)
            ],
        }
        for image, row_classes, row_values in zip(
            images, classes.tolist(), values.tolist(), strict=True
        )
    ]
    if json:
        print(json_module.dumps(answers, indent=2))
        return
    table = Table()
    for heading in ("image", "class", "probability"):
        table.add_column(heading, overflow="fold")
    for image, row_classes, row_values in zip(
        images, classes.tolist(), values.tolist(), strict=True
    ):
        for rank, (c, p) in enumerate(zip(row_classes, row_values, strict=True)):
            table.add_row("" if rank else escape(image), escape(names[c]), f"{100 * p:.2f} %")
    Console(highlight=False).print(table)
