"""The C library's allocator, told to keep what it is given back."""

from __future__ import annotations

import ctypes
import sys

# glibc's names for its settings (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let freed CPU memory stay with the process, for every later allocation to use.

    glibc gives large blocks back to the system at once, and takes them anew, page by page, at the
    next step. On 2 cores that cost a backpropagation step of SmallConv 75 ms where 58 do, and a
    local step as much in proportion. The process then keeps the most memory it ever used.

    Returns:
        Whether it could be done: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # glibc up to 2.34 refuses (0) more than 32 MiB. The others are worth having only with it: by
    # themselves they would leave every larger block to be mapped anew.
    if not any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in (2**30, 2**25)):
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
    padded = mallopt(_M_TOP_PAD, 2**26) == 1
    return bool(kept and padded)
