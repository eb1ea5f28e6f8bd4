"""Each block is updated as soon as it has run: nothing is kept for later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.engine.procedures.base import Outcome, OutputLayer, not_below_float32, standing_in
from locallearn.engine.units import BlockUnit, UnitSignal
from locallearn.errors import UserError


class LocalUpdates:
    """For rules that need a block's own output and the label.

    Arguments:
        model: whose blocks the units hold.
        units: in the order of ``named_modules``.
        output_layer: what lies in no block.
        side_stream: on which units may go on after their output is there; waited for at the end.
    """

    can_be_graphed = True

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[BlockUnit],
        output_layer: OutputLayer,
        side_stream: torch.cuda.Stream | None,
    ) -> None:
        self._model = model
        self._units = units
        self._output_layer = output_layer
        self._side_stream = side_stream

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        signals: dict[str, UnitSignal] = {}
        with standing_in(forwards_of(self._units, labels, signals)):
            logits = self._model(images)
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
        with torch.autocast(images.device.type, enabled=False):
            logits = not_below_float32(logits)
            loss = self._output_layer.loss(logits, labels)
            self._output_layer.learn(loss)
        return Outcome(logits.detach(), loss.detach(), signals)


def forwards_of(
    units: Sequence[BlockUnit], labels: Tensor, signals: dict[str, UnitSignal]
) -> dict[nn.Module, Callable[..., Any]]:
    """Module -> what stands in for its forward; what the heads say goes to ``signals``."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def step(unit: BlockUnit) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if unit.name in signals:
                raise UserError(
                    f"block {unit.name!r} runs twice in one forward; a block is updated as soon "
                    f"as it has run, so it must run once."
                )
            output, signals[unit.name] = unit.step(labels, *args, **kwargs)
            return output

        return forward

    for unit in units:
        forwards |= unit.leading_forwards()
        forwards[unit.block] = step(unit)
    return forwards
