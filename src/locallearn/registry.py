"""A name -> entry table with errors that list what is registered."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Generic, TypeVar

from locallearn.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind ("model", "rule", "dataset", ...).

    Arguments:
        kind: what an entry is called in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` under ``name``. Raises ValueError where the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Take ``name`` out again (tests and plug-ins that reload)."""
        self._entries.pop(name, None)

    def get(self, name: str) -> T:
        """The entry of that name. Raises UserError with the valid names and the nearest one."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """All registered names that match the glob ``pattern``, sorted."""
        return sorted(name for name in self._entries if fnmatch(name, pattern))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
