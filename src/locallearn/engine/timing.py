"""Times of what runs on a device, and whose turn it is where several are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Side = TypeVar("Side")


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has done all that it started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def order_of_round(sides: Sequence[Side], number: int) -> list[Side]:
    """Another first one each round, so that none always follows the same neighbour."""
    first = number % len(sides)
    return [*sides[first:], *sides[:first]]
