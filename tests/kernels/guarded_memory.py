"""New memory that shows what was not written, and what was written that is not its own.

Under a tool that looks for the same (benchmarks/sanitize_kernels.py) the environment variable
LOCALLEARN_TESTS_PLAIN_MEMORY=1 leaves memory as it comes: filled memory is never uninitialized, and
what is written to its margins is within an allocation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_MARGIN_BYTES = 256
_MARK = 0xFF  # all bits: a NaN of every type, which no kernel writes as its own


class GuardedMemory:
    """Stands for torch.empty and torch.empty_like.

    New memory is NaN, or the highest integer, so that nothing passes by not being written. It lies
    in the middle of a larger buffer, aligned as an allocation of its own would be, whose other
    bytes are marked.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []  # with how many bytes are a tensor's own
        self._empty = torch.empty

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.environ.get("LOCALLEARN_TESTS_PLAIN_MEMORY") == "1":
            return
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, self._guarded(getattr(torch, name)))

    def check(self) -> None:
        """No byte beside a tensor was written."""
        for buffer, num_bytes in self._buffers:
            end = _MARGIN_BYTES + num_bytes
            assert (buffer[:_MARGIN_BYTES] == _MARK).all(), "written before a tensor's begin"
            assert (buffer[end:] == _MARK).all(), "written behind a tensor's end"

    def _guarded(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            model = make(*args, **kwargs)
            # Memory of the host that a device reads can't be a view of other memory.
            made = model if model.is_pinned() else self._within_a_buffer(model)
            is_float = made.dtype.is_floating_point
            return made.fill_(math.nan if is_float else torch.iinfo(made.dtype).max)

        return wrapper

    def _within_a_buffer(self, model: Tensor) -> Tensor:
        num_bytes = model.numel() * model.element_size()
        buffer = self._empty(
            num_bytes + 2 * _MARGIN_BYTES, dtype=torch.uint8, device=model.device
        ).fill_(_MARK)
        self._buffers.append((buffer, num_bytes))
        own = buffer[_MARGIN_BYTES : _MARGIN_BYTES + num_bytes].view(model.dtype)
        return own.as_strided(model.shape, model.stride())
