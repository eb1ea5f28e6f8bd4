"""Our docstrings as mkdocstrings reads them: roles, and several names before one colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:meth|func|class):`([^`]+)`")
_SECTIONS = ("Arguments:", "Attributes:")
_SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _one_name_each(_ROLE.sub(r"`\1`", obj.docstring.value))


def _one_name_each(text: str) -> str:
    """`mean, std: the text` as `mean: the text` and `std: the text`."""
    lines: list[str] = []
    pending = text.splitlines()
    is_in_section = False
    while pending:
        line = pending.pop(0)
        if line and not line.startswith(" "):
            is_in_section = line in _SECTIONS
        several = _SEVERAL.match(line) if is_in_section else None
        if several is None:
            lines.append(line)
            continue
        rest = []
        while pending and pending[0].startswith("     "):
            rest.append(pending.pop(0))
        for name in several[1].split(", "):
            lines += [f"    {name}: {several[2]}", *rest]
    return "\n".join(lines)
