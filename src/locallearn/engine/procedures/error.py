"""Blocks run, wait for the error at the network's output, and are updated by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import Inputs, call_model, standing_in
from locallearn.engine.procedures.base import Outcome, OutputLayer, logits_of, not_below_float32
from locallearn.engine.procedures.local import forwards_of
from locallearn.engine.units import GenericUnit, UnitResult, UnitSignal
from locallearn.rules import ErrorHead


class ErrorUnit(GenericUnit):
    """A block whose graph is kept until the error is known. Autograd ends at its input."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._pending: Tensor | None = None

    def step(self, labels: Tensor, *args: Any, **kwargs: Any) -> UnitResult:
        """The forward alone; :meth:`learn` updates."""
        self._pending, output = self.run(len(labels), *args, **kwargs)
        return UnitResult(output, UnitSignal(None, None, None))

    def learn(self, error: Tensor) -> None:
        """Update from the error at the logits, (N, K)."""
        activation, self._pending = self._pending, None
        assert activation is not None, "the block has not run"
        assert isinstance(self.head, ErrorHead)
        hidden = activation.detach()
        grad = self.head.signal(hidden, error).to(hidden.dtype)
        self.backward(activation, grad, keeps_graph=self._reads_loose)
        del activation
        self._update()

    def abandon(self) -> None:
        super().abandon()
        self._pending = None


class ErrorUpdates:
    """For rules that hand each block the network's error: memory grows with depth, as in
    backpropagation, but blocks need not wait for each other.

    Arguments:
        model: whose blocks the units hold.
        units: in the order of ``named_modules``.
        output_layer: what lies in no block.
        frozen: module -> what stands in for its forward, of blocks that stay as they are.
    """

    can_be_graphed = True

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[ErrorUnit],
        output_layer: OutputLayer,
        frozen: Mapping[nn.Module, Callable[..., Any]] | None = None,
    ) -> None:
        self._model = model
        self._units = units
        self._output_layer = output_layer
        self._frozen = dict(frozen or {})

    def __call__(self, images: Inputs, labels: Tensor) -> Outcome:
        signals: dict[str, UnitSignal] = {}
        with standing_in(self._frozen | forwards_of(self._units, labels, signals)):
            logits = logits_of(call_model(self._model, images))
        with torch.autocast(logits.device.type, enabled=False):
            logits = not_below_float32(logits)
            loss, error = self._output_layer.error(logits, labels)
            self._output_layer.backward(logits, error)
            for unit in self._units:
                if unit.name in signals:
                    unit.learn(error)
            self._output_layer.update()
        return Outcome(logits.detach(), loss, signals)
