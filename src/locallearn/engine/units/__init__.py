"""A block with its head and its optimizer, updated together, and the two ways to do it.

`closed_form`: a block that is convolution or linear layer (or a depthwise-separable pair),
BatchNorm and (Leaky)ReLU needs no autograd graph; `blocks.recognition` tells which blocks are.
`generic`: any other block runs under autograd, and its head receives its output.
"""

from __future__ import annotations

from typing import Any

import torch

from locallearn.engine.blocks import recognize
from locallearn.engine.units.base import BlockUnit, UnitResult, UnitSignal
from locallearn.engine.units.closed_form import ClosedFormUnit, DepthwiseSeparableUnit
from locallearn.engine.units.generic import GenericUnit
from locallearn.rules import LatentHead

__all__ = [
    "BlockUnit",
    "ClosedFormUnit",
    "DepthwiseSeparableUnit",
    "GenericUnit",
    "UnitResult",
    "UnitSignal",
    "build_unit",
]


def build_unit(
    *, side_stream: torch.cuda.Stream | None, head_after_pool: bool, **settings: Any
) -> BlockUnit:
    """The unit that fits a block and its head; ``settings`` are those of :class:`GenericUnit`."""
    form = recognize(settings["block"])
    is_alone = not settings["leaders"] and not settings["reads_loose"]
    is_square = isinstance(settings["latent_size"], int)
    is_latent = isinstance(settings["head"], LatentHead)
    if form is None or not (is_alone and is_square and is_latent):
        return GenericUnit(head_after_pool=head_after_pool, **settings)
    if head_after_pool and form.max_pool > 1:
        return GenericUnit(head_after_pool=True, **settings)
    kind = ClosedFormUnit if form.inner is None else DepthwiseSeparableUnit
    return kind(form=form, side_stream=side_stream, **settings)
