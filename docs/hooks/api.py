"""The reference of the Python names: what each room's `__all__` lists, for mkdocstrings to fill."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import locallearn

ROOMS = ("engine", "distributed", "export", "integrations", "rules", "kernels", "models", "data")

_INTRODUCTION = """# Python

`import locallearn` brings the names below. Each room of the package has more, on a page of its own:
"""


def api_pages() -> dict[str, str]:
    """File name -> page, in Markdown."""
    rooms = {room: importlib.import_module(f"locallearn.{room}") for room in ROOMS}
    pages = {"api.md": _index(rooms)}
    for room, module in rooms.items():
        entries = [_entry(f"locallearn.{room}.{name}") for name in _in_order(module)]
        pages[f"api-{room}.md"] = "\n".join(
            [f"# locallearn.{room}\n", f"{inspect.getdoc(module)}\n", *entries]
        )
    return pages


def _index(rooms: dict[str, ModuleType]) -> str:
    lines = [_INTRODUCTION]
    for room, module in rooms.items():
        lines.append(f"- [locallearn.{room}](api-{room}.md): {_first_line(module)}")
    lines += ["", "| name | |", "|---|---|"]
    own = []
    for name in locallearn.__all__:
        value = getattr(locallearn, name)
        room = next((room for room, module in rooms.items() if hasattr(module, name)), None)
        if room is not None:
            lines.append(f"| [`{name}`][locallearn.{room}.{name}] | {_first_line(value)} |")
        elif name != "__version__":
            lines.append(f"| [`{name}`][locallearn.errors.{name}] | {_first_line(value)} |")
            own.append(_entry(f"locallearn.errors.{name}"))
    return "\n".join([*lines, "", *own])


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _in_order(module: ModuleType) -> list[str]:
    """Classes, then functions, then constants, each in the order of `__all__`."""

    def kind(name: str) -> int:
        if name not in vars(module):
            return 0  # a class that is imported on first use, and may need an extra
        value = vars(module)[name]
        return 0 if inspect.isclass(value) else 1 if inspect.isroutine(value) else 2

    return sorted(module.__all__, key=kind)


def _entry(path: str) -> str:
    return f"::: {path}\n"
