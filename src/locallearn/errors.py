"""The one exception that means "the input is wrong, and here is what to do"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, said in one line: what was wrong, what was expected, what to do.

    The command line prints the message and exits with code 2; a library user sees an
    ordinary ValueError. Everything else that is raised is a bug of ours.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 2


class Silent(UserError):  # noqa: N818 - says what it is
    """What another process of the same training says: the command line exits without a word.

    Arguments:
        message: what it says.
        exit_code: of the command line.
    """

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown_name(
    kind: str, name: str, valid: Iterable[str], *, listed_by: str | None = None
) -> UserError:
    """The error for a name that is in no registry: the nearest valid one, then all of them.

    Where they are too many for a line, ``listed_by`` is the command that lists them, and the
    nearest three are named.
    """
    names = sorted(valid)
    num_near = 1 if listed_by is None else 3
    nearest = difflib.get_close_matches(name.lower(), names, n=num_near, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    rest = f"Valid: {', '.join(names)}." if listed_by is None else f"`{listed_by}` lists them."
    return UserError(f"unknown {kind} {name!r}.{hint} {rest}")
