"""A block with its head and its optimizer, updated together, and the two ways to do it.

`closed_form`: a block that is convolution or linear layer (or a depthwise-separable pair),
BatchNorm and (Leaky)ReLU needs no autograd graph. `generic`: any other block runs under autograd,
and its head receives its output. `eligibility` tells which block is which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from locallearn.engine.units.base import BlockUnit, UnitResult, UnitSignal
from locallearn.engine.units.closed_form import ClosedFormUnit, DepthwiseSeparableUnit
from locallearn.engine.units.eligibility import has_closed_form
from locallearn.engine.units.generic import GenericUnit
from locallearn.models import DepthwiseSeparableBlock
from locallearn.rules import LatentHead

__all__ = [
    "BlockUnit",
    "ClosedFormUnit",
    "DepthwiseSeparableUnit",
    "GenericUnit",
    "UnitResult",
    "UnitSignal",
    "build_unit",
    "has_closed_form",
]


def build_unit(
    *, side_stream: torch.cuda.Stream | None, head_after_pool: bool, **settings: Any
) -> BlockUnit:
    """The unit that fits a block and its head; ``settings`` are those of :class:`GenericUnit`."""
    block = settings["block"]
    fits = has_closed_form(block) and isinstance(settings["head"], LatentHead)
    is_pooled_first = head_after_pool and not isinstance(getattr(block, "pool", None), nn.Identity)
    if not fits or is_pooled_first or settings["leaders"]:
        return GenericUnit(head_after_pool=head_after_pool, **settings)
    if isinstance(block, DepthwiseSeparableBlock):
        return DepthwiseSeparableUnit(side_stream=side_stream, **settings)
    return ClosedFormUnit(side_stream=side_stream, **settings)
