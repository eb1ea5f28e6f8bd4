"""The disk: its free space, locks against other processes, errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from locallearn.data.listening import readable_size
from locallearn.errors import UserError


def check_space(directory: Path, num_bytes: int, what: str) -> None:
    """Raises UserError where ``directory``, which need not exist yet, has less room than that."""
    place = directory.absolute()
    # None of them exists where the whole drive does not.
    there = next((each for each in (place, *place.parents) if each.exists()), place)
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise UserError(
            f"{what} needs {readable_size(num_bytes)} in {directory}, where {readable_size(free)} "
            f"are free. Free some space, or choose a directory on another disk."
        )


def lock(file: IO[bytes]) -> bool | None:
    """Lock an open file against other processes of this machine, until it is closed.

    Returns:
        True where it is locked now, False where another process has locked it, None where there
        are no locks: on Windows, and on some network file systems.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def only_one(file: IO[bytes], doing: str) -> None:
    """Lock the file, where there are locks. Raises UserError where another process has."""
    if lock(file) is False:
        raise UserError(f"{doing} by another process. Wait for it to end.")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within: a failure to write (a full disk) that names no file names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
