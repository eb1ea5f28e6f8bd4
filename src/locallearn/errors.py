"""The one exception that means "the input is wrong, and here is what to do"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, said in one line: what was wrong, what was expected, what to do.

    The command line prints the message and exits with code 2; a library user sees an
    ordinary ValueError. Everything else that is raised is a bug of ours.
    """


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is in no registry: the nearest valid one, then all of them."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(names)}.")
