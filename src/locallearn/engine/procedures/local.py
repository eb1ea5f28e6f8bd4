"""Each block is updated as soon as it has run: nothing is kept for later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import Inputs, call_model, standing_in
from locallearn.engine.procedures.base import Outcome, OutputLayer, logits_of, not_below_float32
from locallearn.engine.units import BlockUnit, UnitSignal
from locallearn.errors import UserError


class LocalUpdates:
    """For rules that need a block's own output and the label.

    Arguments:
        model: whose blocks the units hold.
        units: in the order of ``named_modules``.
        output_layer: what lies in no block.
        side_stream: on which units may go on after their output is there; waited for at the end.
        allow_reuse: whether a block may run, and learn, more than once in a forward.
        frozen: module -> what stands in for its forward, of blocks that stay as they are.
    """

    can_be_graphed = True

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[BlockUnit],
        output_layer: OutputLayer,
        side_stream: torch.cuda.Stream | None,
        *,
        allow_reuse: bool = False,
        frozen: Mapping[nn.Module, Callable[..., Any]] | None = None,
    ) -> None:
        self._model = model
        self._units = units
        self._output_layer = output_layer
        self._side_stream = side_stream
        self._allow_reuse = allow_reuse
        self._frozen = dict(frozen or {})

    def __call__(self, images: Inputs, labels: Tensor) -> Outcome:
        signals: dict[str, UnitSignal] = {}
        with self.learning(labels, signals):
            logits = logits_of(call_model(self._model, images))
        with torch.autocast(logits.device.type, enabled=False):
            logits = not_below_float32(logits)
            loss = self._output_layer.loss(logits, labels)
            self._output_layer.learn(loss)
        return Outcome(logits.detach(), loss.detach(), signals)

    def num_at_a_time(self, num_images: int) -> int:
        return num_images

    @contextmanager
    def learning(self, labels: Tensor, signals: dict[str, UnitSignal]) -> Iterator[None]:
        """Within: each block learns when the model's forward comes to it.

        Arguments:
            labels: (N,), int64.
            signals: receives what the heads say.
        """
        forwards = forwards_of(self._units, labels, signals, allow_reuse=self._allow_reuse)
        with standing_in(self._frozen | forwards):
            yield
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)


def forwards_of(
    units: Sequence[BlockUnit],
    labels: Tensor,
    signals: dict[str, UnitSignal],
    *,
    allow_reuse: bool = False,
) -> dict[nn.Module, Callable[..., Any]]:
    """Module -> what stands in for its forward; what the heads say goes to ``signals``: of a block
    that runs more than once, what its head says at the last."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def step(unit: BlockUnit) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if unit.name in signals and allow_reuse:
                unit.updates.settle(unit.optimizer)
            elif unit.name in signals:
                raise UserError(
                    f"block {unit.name!r} runs twice in one forward; a block is updated as soon "
                    f"as it has run, so it must run once, unless allow_reuse=True has it learn "
                    f"each time."
                )
            output, signals[unit.name] = unit.step(labels, *args, **kwargs)
            return output

        return forward

    for unit in units:
        forwards |= unit.forwards(step(unit))
    return forwards
