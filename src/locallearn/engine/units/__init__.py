"""A block with its head and its optimizer, updated together, and the two ways to do it.

`closed_form`: a block that is convolution or linear layer (or a depthwise-separable pair),
BatchNorm and (Leaky)ReLU needs no autograd graph; `blocks.recognition` tells which blocks are.
`generic`: any other block runs under autograd, and its head receives its output.
"""

from __future__ import annotations

from typing import Any

import torch

from locallearn.engine.blocks import ClosedForm
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
    *,
    form: ClosedForm | None,
    side_stream: torch.cuda.Stream | None,
    head_after_pool: bool,
    **settings: Any,
) -> BlockUnit:
    """The unit that fits a block and its head.

    Arguments:
        form: what the closed form needs of the block, where it covers it.
        side_stream, head_after_pool: see :class:`ClosedFormUnit` and :class:`GenericUnit`.
        settings: of :class:`GenericUnit`.
    """
    is_latent = isinstance(settings["head"], LatentHead)
    if form is None or settings["leaders"] or not is_latent:
        return GenericUnit(head_after_pool=head_after_pool, **settings)
    if head_after_pool and form.max_pool > 1:
        return GenericUnit(head_after_pool=True, **settings)
    kind = ClosedFormUnit if form.inner is None else DepthwiseSeparableUnit
    return kind(form=form, side_stream=side_stream, **settings)
