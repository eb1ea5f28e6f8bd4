"""`locallearn list`."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from locallearn.errors import unknown_name

_KINDS = ("models", "rules", "datasets")


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help="models, rules or datasets; all of them by default.", metavar="KIND"),
    ] = None,
) -> None:
    """The models, rules and datasets there are."""
    if kind is not None and kind not in _KINDS:
        raise unknown_name("kind", kind, _KINDS)
    console = Console(highlight=False)
    for each in (kind,) if kind else _KINDS:
        console.print({"models": _models, "rules": _rules, "datasets": _datasets}[each]())


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    return table


def _models() -> Table:
    from locallearn.models import build_model, list_models, model_spec

    table = _table("models", "name", "what it is", "parameters (10 classes)", "smallest image")
    for name in list_models():
        spec = model_spec(name)
        num_params = sum(p.numel() for p in build_model(name).parameters())
        side = spec.min_image_size
        table.add_row(name, spec.summary, f"{num_params:,}", f"{side}x{side}")
    return table


def _rules() -> Table:
    from locallearn.rules import Information, list_rules, rule_class, rule_package

    with warnings.catch_warnings(record=True) as caught:
        names = list_rules()
    for warning in caught:
        print(f"Warning: {warning.message}", file=sys.stderr)
    origins = {
        name: f"{package} {importlib.metadata.version(package)}"
        for name in names
        if (package := rule_package(name))
    }
    headings = ["name", "what it is", "trains besides the network", "learns from"]
    table = _table("rules", *headings, *(["from"] if origins else []))
    for name in names:
        rule = rule_class(name)
        # In the order of the declaration, from the nearest to the farthest.
        reached = [information for information in Information if information in rule.learns_from]
        origin = [origins.get(name, "locallearn")] if origins else []
        table.add_row(name, rule.summary, rule.trains, ", ".join(reached), *origin)
    table.caption = (
        "learns from: what reaches a block's update, as the tests measure it by perturbation"
        + ("; of rules from elsewhere, as they say themselves" if origins else "")
    )
    table.caption_justify = "left"
    return table


def _datasets() -> Table:
    from locallearn.data import dataset_spec, list_datasets

    table = _table("datasets", "name", "what it is")
    for name in list_datasets():
        table.add_row(name, dataset_spec(name).summary)
    return table
