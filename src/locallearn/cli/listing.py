"""`locallearn list`."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.errors import UserError, unknown_name

_KINDS = ("models", "rules", "datasets")


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help="models, rules or datasets; all of them by default.", metavar="KIND"),
    ] = None,
    pattern: Annotated[
        str,
        typer.Argument(
            help="Names to list, with * and ?; of models also 'torchvision:*' and 'timm:*'.",
            show_default=False,
        ),
    ] = "*",
) -> None:
    """The models, rules and datasets there are."""
    if kind is not None and kind not in _KINDS:
        raise unknown_name("kind", kind, _KINDS)
    if kind == "models" and ":" in pattern:
        _print_names(pattern)
        return
    console = Console(highlight=False)
    for each in (kind,) if kind else _KINDS:
        table = {"models": _models, "rules": _rules, "datasets": _datasets}[each](pattern)
        if not table.row_count:
            raise UserError(f"none of the {each} is called {pattern}. `locallearn list {each}`.")
        console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    return table


def _print_names(pattern: str) -> None:
    """Of models from elsewhere: a line each, to be pasted behind --model."""
    from locallearn.models import list_models

    names = list_models(pattern)
    if not names:
        source = pattern.partition(":")[0]
        raise UserError(f"no model is called {pattern}. `locallearn list models '{source}:*'`.")
    print("\n".join(names))


def _models(pattern: str) -> Table:
    from locallearn.models import build_model, list_models, model_spec

    table = _table("models", "name", "what it is", "parameters (10 classes)", "smallest image")
    for name in list_models(pattern):
        spec = model_spec(name)
        num_params = sum(p.numel() for p in build_model(name).parameters())
        side = spec.min_image_size
        table.add_row(name, spec.summary, f"{num_params:,}", f"{side}x{side}")
    table.caption = (
        f"from elsewhere: torchvision:NAME ({_count('torchvision')}), timm:NAME "
        f"({_count('timm')}), FILE.py:FUNCTION; `locallearn list models 'torchvision:res*'`"
    )
    return table


def _count(package: str) -> str:
    """How many models a package has, in words."""
    from locallearn.models import list_models

    try:
        return f"{len(list_models(f'{package}:*')):,} models"
    except UserError as error:
        return escape(str(error).rstrip("."))


def _rules(pattern: str) -> Table:
    from locallearn.rules import Information, list_rules, rule_class, rule_package

    with warnings.catch_warnings(record=True) as caught:
        names = list_rules(pattern)
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
    return table


def _datasets(pattern: str) -> Table:
    from locallearn.data import dataset_spec, list_datasets

    table = _table("datasets", "name", "what it is")
    for name in list_datasets(pattern):
        table.add_row(name, dataset_spec(name).summary)
    return table
