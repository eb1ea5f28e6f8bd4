"""Our docstrings as mkdocstrings reads them: as Markdown, with one name before each colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:meth|func|class):`([^`]+)`")
_SECTIONS = ("Arguments:", "Attributes:", "Raises:", "Returns:", "Yields:")
_SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")
_CODE = re.compile(r"(`+[^`]+`+)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring without roles, with its asterisks escaped, and `mean, std: the text` as two
    items `mean: the text` and `std: the text`."""
    lines: list[str] = []
    pending = _ROLE.sub(r"`\1`", docstring).splitlines()
    is_in_section = False
    while pending:
        line = pending.pop(0)
        if line and not line.startswith(" "):
            is_in_section = line in _SECTIONS
        if is_in_section or not line.startswith("    "):  # what else is indented is a formula
            line = _without_emphasis(line)
        several = _SEVERAL.match(line) if is_in_section else None
        if several is None:
            lines.append(line)
            continue
        rest = []
        while pending and pending[0].startswith("     "):
            rest.append(_without_emphasis(pending.pop(0)))
        for name in several[1].split(", "):
            lines += [f"    {name}: {several[2]}", *rest]
    return "\n".join(lines)


def _without_emphasis(line: str) -> str:
    """The line with each asterisk outside of code as the character that it is."""
    parts = _CODE.split(line)
    return "".join(p if p.startswith("`") else p.replace("*", r"\*") for p in parts)
