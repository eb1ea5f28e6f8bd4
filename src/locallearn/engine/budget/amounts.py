"""Numbers of bytes as text."""

from __future__ import annotations

import math
import re

from locallearn.errors import UserError

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)


def parse_memory(text: str) -> int:
    """Bytes, from a number and its unit: "256MiB", "1.5 GB". Upper and lower case are one.

    Raises:
        UserError: anything else, or less than a byte.
    """
    found = _AMOUNT.fullmatch(text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise UserError(
            f"{text!r} is no amount of memory; a number and its unit are expected, as 256MiB or "
            f"1.5GB. Units: {', '.join(_UNITS)}."
        )
    num_bytes = math.floor(float(found[1]) * units[found[2].lower()])
    if num_bytes < 1:
        raise UserError(f"{text!r} is less than one byte; give more memory, as 256MiB.")
    return num_bytes


def format_memory(num_bytes: int) -> str:
    """In MiB, or in GiB from 1024 MiB on: "31.2 MiB"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
