"""`locallearn blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.analysis.blocks import BlockCost, ModelCost


def blocks(
    model: Annotated[
        str,
        typer.Argument(
            help="Network: a name of `locallearn list models`, torchvision:NAME, timm:NAME, or "
            "FILE.py:FUNCTION.",
            metavar="MODEL",
        ),
    ],
    blocks: Annotated[
        str,
        typer.Option(
            help="auto, or names, globs (layer*.?) and type:CLASS, separated by commas.",
            metavar="WHICH",
        ),
    ] = "auto",
    image_size: Annotated[int, typer.Option(help="Height and width, pixels.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step, for which memory is told.")] = 128,
    allow_reuse: Annotated[
        bool, typer.Option("--allow-reuse", help="A block may run more than once in a forward.")
    ] = False,
    json: Annotated[
        str | None, typer.Option(help="Write all figures as JSON.", metavar="FILE.json")
    ] = None,
) -> None:
    """Which modules of a network learn by themselves, and what each of them costs.

    Nothing is trained. params: trained ones, of the block and of what learns with it; MMAC: million
    multiply-accumulates of the forward, of one image; MiB: what the block's step keeps of a batch
    (its input, its output, and what its backward needs), which local learning frees before the next
    block; T: values that a local head reads; path: how a rule that reads pooled latents updates it,
    in closed form (docs/closed-form.md) or by autograd inside the block.
    """
    import torch

    from locallearn.analysis import count_blocks
    from locallearn.engine.files import check_target, write_json
    from locallearn.models import build_model

    for name, value in (("channels", channels), ("classes", classes), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if image_size < 1:
        raise UserError(f"--image-size must be at least 1, got {image_size}.")
    if json is not None:
        check_target(Path(json), "--json")
    torch.manual_seed(0)
    network = build_model(model, num_classes=classes, in_channels=channels, image_size=image_size)
    cost = count_blocks(
        network,
        torch.randn(2, channels, image_size, image_size),
        blocks=blocks,
        num_classes=classes,
        batch_size=batch_size,
        allow_reuse=allow_reuse,
    )
    console = Console(highlight=False)
    title = f"{model}: {channels}x{image_size}x{image_size}, {classes} classes, batch {batch_size}"
    console.print(_table(cost, title))
    for line in _notes(cost):
        console.print(line, soft_wrap=True)
    if json is not None:
        settings = {
            "model": model,
            "blocks": blocks,
            "image_size": image_size,
            "channels": channels,
            "classes": classes,
            "batch_size": batch_size,
        }
        write_json(Path(json), {"settings": settings, **asdict(cost)})
        print(f"written to {json}")


def _table(cost: ModelCost, title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
        show_footer=True,
    )
    local, backprop = (f"{n / 2**20:,.1f}" for n in (cost.local_bytes, cost.backprop_bytes))
    table.add_column("block", "output layer\nwhole network\nlargest block alone", no_wrap=True)
    table.add_column("module", overflow="fold")
    table.add_column(
        "params",
        f"{cost.num_output_params:,}\n{cost.num_params:,}\n",
        justify="right",
        no_wrap=True,
    )
    table.add_column("MMAC", f"\n{cost.num_macs / 1e6:,.1f}\n", justify="right", no_wrap=True)
    table.add_column("MiB", f"\n{backprop}\n{local}", justify="right", no_wrap=True)
    table.add_column("T", justify="right", no_wrap=True)
    table.add_column("path", no_wrap=True)
    for label, block in _tree(cost.blocks):
        if block is None:
            table.add_row(label)
            continue
        table.add_row(
            label,
            block.kind,
            f"{block.num_params:,}",
            f"{block.num_macs / 1e6:,.1f}",
            f"{block.activation_bytes / 2**20:,.1f}",
            f"{block.latent_length:,}",
            block.path,
        )
    return table


def _tree(blocks: Sequence[BlockCost]) -> list[tuple[str, BlockCost | None]]:
    """A row for each block, and one for each module around several, indented as they are held.

    A chain is named by the first and the last of its modules.
    """
    rows: list[tuple[str, BlockCost | None]] = []
    around: tuple[str, ...] = ()
    for block in blocks:
        *parents, last = block.name.split(".")
        shared = 0
        while shared < min(len(parents), len(around)) and parents[shared] == around[shared]:
            shared += 1
        for depth in range(shared, len(parents)):
            rows.append(("  " * depth + parents[depth], None))
        around = tuple(parents)
        if len(block.modules) > 1:
            last += " .. " + block.modules[-1].removeprefix(".".join([*parents, ""]))
        rows.append(("  " * len(parents) + last, block))
    return rows


def _notes(cost: ModelCost) -> list[str]:
    notes = [f"output layer: {_list(cost.output)}"] if cost.output else []
    notes += [f"{_list(b.joined)} learn with {b.name}" for b in cost.blocks if b.joined]
    if cost.shared:
        notes.append(
            f"{_list(cost.shared)} are read by several of these, and learn from all, at the end "
            f"of a step"
        )
    if cost.untrained:
        notes.append(f"not trained, as no output depends on them: {_list(cost.untrained)}")
    return notes


def _list(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
