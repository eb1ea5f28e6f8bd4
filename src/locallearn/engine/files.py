"""Writing files so that a crash, a full disk or a kill leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from locallearn.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, flush to disk, and rename.

    Raises:
        OSError: as the file system says; ``path`` is then as it was and the temporary is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # and not the temporary's name, or none (a full disk)
        raise


def check_target(path: Path, flag: str) -> None:
    """Raises UserError where a file can't be put there: before the work it is the result of."""
    if not path.name or path.is_dir():
        raise UserError(f"{flag} {path} is a directory; give a file.")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no directory {path.parent}.")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinity, no JSON, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
