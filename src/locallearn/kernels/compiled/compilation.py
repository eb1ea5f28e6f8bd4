"""How the functions of this backend are compiled, and the layout that they work on."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

# Inductor writes an intermediate value to memory once its expression reads more than 4 tensors or
# counts more than 30 operations. Here that would be a tensor as large as z for a few additions:
# block_forward of (64, 256, 32, 32) took 21 ms with it on 2 cores, and 4 without.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 1000,
}

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _specialized(function: Callable[P, R], key: tuple[object, ...]) -> Callable[P, R]:
    """``function`` compiled for one key.

    Under a code object of its own: torch.compile counts and searches what it compiled by code
    object, and would give up on the ninth shape.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{'_'.join(map(str, key))}"
    copy = types.FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__
    )
    # fullgraph: what can't be compiled as one piece is an error, not a slow piece.
    return torch.compile(copy, dynamic=False, fullgraph=True, options=_OPTIONS)


def specialized(function: Callable[P, R], *key: object) -> Callable[P, R]:
    """``function`` compiled for the values in ``key``, which tell its static shapes apart."""
    return _specialized(function, key)


def open_batch(*tensors: Tensor) -> None:
    """Leave the first dimension of each open when it is compiled for."""
    for tensor in tensors:
        if tensor.shape[0] > 1:  # a batch of one is compiled for by itself
            torch._dynamo.mark_dynamic(tensor, 0)


def open_rows(*tensors: Tensor) -> tuple[object, ...]:
    """Leave batch and positions of (N, H W, C) tensors open, and tell what is left to compile for.

    For the passes that run through memory whatever its shape: a network of many shapes would
    otherwise spend a second of compiling on each.
    """
    for tensor in tensors:
        for dimension in (0, 1):
            if tensor.shape[dimension] > 1:  # one is compiled for by itself
                torch._dynamo.mark_dynamic(tensor, dimension)
    n, length, channels = tensors[0].shape
    return n == 1, length == 1, channels


def rows_of(z: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), a view where z is channels-last; (N, F) as it is."""
    return z.permute(0, 2, 3, 1) if z.ndim == 4 else z


def overwrite(z: Tensor, rows: Tensor) -> Tensor:
    """Write (N, H, W, C) or (N, F) into z's own memory, where it is not there already."""
    target = rows_of(z)
    if target.data_ptr() != rows.data_ptr() or target.stride() != rows.stride():
        target.copy_(rows)
    return z
