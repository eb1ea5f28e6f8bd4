"""Names of files and directories that the program chooses."""

from __future__ import annotations

import re


def file_name(*parts: str | None) -> str:
    """The parts that there are, joined, with nothing in them that a file system minds."""
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts if part)
