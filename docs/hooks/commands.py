"""The command reference, from the command line itself: every subcommand, argument and option."""

from __future__ import annotations

import html
import inspect
from typing import Any

import typer.main

from locallearn.cli.main import app

_INTRODUCTION = """# Commands

Made from the command line itself, which prints the same with `--help`. Exit codes: 0 done; 2 the
input was wrong, and one line on standard error says how; 130 and 143 stopped by Ctrl-C or SIGTERM,
with everything saved.
"""


def command_reference() -> str:
    """The page, in Markdown."""
    root = typer.main.get_command(app)
    context = root.make_context("locallearn", [], resilient_parsing=True)
    sections = [_INTRODUCTION]
    for name, command in root.commands.items():
        sections += _sections(command, name, context, level=2)
    return "\n".join(sections)


def _sections(command: Any, name: str, parent: Any, level: int) -> list[str]:
    """A section for a command; for a group of commands, one for each after its own."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    sections = [
        f"{'#' * level} {context.command_path}\n",
        f"{inspect.cleandoc(command.help or '')}\n",
        f"```text\n{usage}\n```\n",
    ]
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names, description = parameter.get_help_record(context)
        kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or kind
        panels.setdefault(panel, []).append(f"| {_code(names)} | {_cell(description)} |")
    for panel, rows in panels.items():
        sections.append("\n".join([f"| {panel} | |", "|---|---|", *rows, ""]))
    for inner_name, inner in getattr(command, "commands", {}).items():
        sections += _sections(inner, inner_name, context, level + 1)
    return sections


def _code(text: str) -> str:
    """As code that breaks between its words alone, not at the hyphens of an option's name."""
    words = (f'<code class="word">{html.escape(word)}</code>' for word in text.split())
    return " ".join(words)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
