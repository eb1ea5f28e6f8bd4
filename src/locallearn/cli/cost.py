"""`locallearn cost`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from locallearn.errors import UserError


def cost(
    model: Annotated[
        str, typer.Option(help="Network; `locallearn list models`, or all.")
    ] = "smallconv",
    rules: Annotated[
        str, typer.Option(help="Rules, separated by commas; options as NAME:OPTION=VALUE.")
    ] = "bp,local-losses,dfa,drtp,pepita,lls,lls-s,lls-m,lls-mxm,lls-mxm-reduced",
    image_size: Annotated[int, typer.Option(help="Height and width, pixels.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    json: Annotated[
        str | None, typer.Option(help="Write all figures as JSON.", metavar="FILE.json")
    ] = None,
) -> None:
    """What a training step costs: multiply-accumulates, parameters, activation memory.

    Counted from the shapes of the layers; nothing is run. Signal: MACs that make the gradient at a
    block's output, of one image; step: all MACs of a training step, of one image; rule's: what the
    rule trains besides the network; peak: activation memory of a batch, beyond weights, optimizer
    state and the images: by the closed form for latent rules, by plain PyTorch for bp; of the other
    rules it is not counted, but measured by `locallearn bench`.
    """
    from locallearn.analysis import step_cost
    from locallearn.engine import PRECISIONS
    from locallearn.engine.files import check_target, write_json
    from locallearn.errors import unknown_name
    from locallearn.models import build_block_network, is_foreign, list_models
    from locallearn.rules import build_rule, parse_rule

    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    for name, value in (("channels", channels), ("classes", classes), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if is_foreign(model):
        raise UserError(
            f"cost counts the layers of the package's own networks, and --model {model} is from "
            f"elsewhere. `locallearn bench --model {model}` measures a step's time and memory."
        )
    if json is not None:
        check_target(Path(json), "--json")
    named = [name.strip() for name in rules.split(",") if name.strip()]
    built = [parse_rule(name) for name in named]
    if not built:
        raise UserError("--rules is empty; name one or more, separated by commas.")

    table = Table(
        title=f"{channels}x{image_size}x{image_size}, {classes} classes, batch {batch_size}, "
        f"{precision}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("model", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    for heading in (
        "signal MMAC",
        "step MMAC",
        "parameters",
        "rule's",
        "peak MiB",
        "of bp",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = []
    for name in list_models() if model == "all" else [model]:
        network = build_block_network(
            name, num_classes=classes, in_channels=channels, image_size=image_size
        )
        costs = [
            step_cost(
                network,
                rule,
                image_shape=(channels, image_size, image_size),
                batch_size=batch_size,
                bytes_per_value=2 if precision == "bf16" else 4,
            )
            for rule in [build_rule("bp"), *built]
        ]
        backprop = costs[0]
        for label, each in zip(named, costs[1:], strict=True):
            peak, of_bp = "-", "-"
            if each.peak_activation_bytes is not None:
                assert backprop.peak_activation_bytes is not None
                peak = f"{each.peak_activation_bytes / 2**20:,.1f}"
                of_bp = f"{each.peak_activation_bytes / backprop.peak_activation_bytes:.2f}"
            table.add_row(
                name,
                label,
                f"{each.learning_signal_macs / 1e6:,.3f}",
                f"{each.total_macs / 1e6:,.1f}",
                f"{each.num_params:,}",
                f"{each.num_additional_params:,}",
                peak,
                of_bp,
            )
            rows.append({"model": name, "rule": label, **asdict(each)})
    Console(highlight=False).print(table)
    if json is not None:
        settings = {
            "image_size": image_size,
            "channels": channels,
            "classes": classes,
            "batch_size": batch_size,
            "precision": precision,
        }
        write_json(Path(json), {"settings": settings, "rows": rows})
        print(f"written to {json}")
