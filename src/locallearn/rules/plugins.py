"""Rules of other packages, which say where theirs are by an entry point for each.

    [project.entry-points."locallearn.rules"]
    mono-forward = "my_rules:MonoForward"       # the rule's name = "module:Class"

What is installed declares them; nothing is imported for that. A rule's module is imported when the
rule is first asked for by its name, or when all rules are listed. One that can't be loaded is no
rule, and takes nothing else with it.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

from locallearn.errors import UserError
from locallearn.rules.base import Rule, register_rule

GROUP = "locallearn.rules"


@functools.cache
def declared() -> dict[str, list[EntryPoint]]:
    """Rule name -> the entry points of that name: one, unless two packages are at odds."""
    table: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        table.setdefault(entry.name, []).append(entry)
    return table


@functools.cache
def load(name: str) -> str | None:
    """Register the rule that an entry point of that name declares, where there is one.

    Returns:
        What keeps it from being a rule, or None. The second call does nothing but repeat it.
    """
    entries = declared().get(name, [])
    if not entries:
        return None
    if len(entries) > 1:
        return f"rule {name!r} is declared by {' and by '.join(map(_said, entries))}; keep one."
    (entry,) = entries
    try:
        _register(entry)
    except Exception as error:  # whatever a module of somebody else's raises at its import
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"rule {name!r} is declared by {_said(entry)}, which can't be loaded: {problem}"
    return None


def package(name: str) -> str | None:
    """The distribution that declares a rule; None for a rule of no plug-in."""
    dists = [entry.dist for entry in declared().get(name, [])]
    return dists[0].name if dists and dists[0] else None


def _register(entry: EntryPoint) -> None:
    cls = entry.load()
    if not isinstance(cls, type) or not issubclass(cls, Rule):
        raise UserError(f"{entry.value} is no class of a rule; write it as 'module:Class'.")
    if getattr(cls, "name", entry.name) != entry.name:
        raise UserError(f"the rule calls itself {cls.name!r}; give the entry point that name.")
    register_rule(cls)


def _said(entry: EntryPoint) -> str:
    dist = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package without a name"
    return f"{dist} (entry point {entry.name} = {entry.value})"
