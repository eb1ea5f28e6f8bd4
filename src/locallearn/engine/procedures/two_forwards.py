"""A second forward, of a modulated input, brings the updates (PEPITA).

Shapes: N batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.blocks import standing_in
from locallearn.engine.procedures.base import (
    Outcome,
    OutputLayer,
    not_below_float32,
    without_running_statistics,
)
from locallearn.engine.reduction import Updates
from locallearn.engine.units import BlockUnit
from locallearn.errors import UserError
from locallearn.models import Block, Layer
from locallearn.rules import Modulator


class ModulatedUnit(BlockUnit):
    """A block of which each layer learns from what the modulation changes in its activity.

    Arguments:
        name: of the block in the model.
        block: one of the package's, which can tell its layers.
        optimizer: of its parameters; None where all are frozen.
        updates: of the learner that it is of.
    """

    def __init__(
        self, *, name: str, block: nn.Module, optimizer: Optimizer | None, updates: Updates
    ) -> None:
        if not isinstance(block, Block) or type(block).layers is Block.layers:
            raise UserError(
                f"rule 'pepita' updates layer by layer; block {name!r} ({type(block).__name__}) "
                f"does not say what its layers are. Use a model of locallearn's own, or make the "
                f"block a subclass of locallearn.models.Block with a method layers()."
            )
        super().__init__(
            name=name,
            block=block,
            head=None,
            latent_size=1,
            optimizer=optimizer,
            updates=updates,
        )
        self._layers = block.layers()
        self._downsample = block.downsample
        # Each layer's activity in the first forward, and its version then.
        self._standard: list[tuple[Tensor, int]] = []

    def observe(self, x: Tensor) -> Tensor:
        """The first forward: what every layer's activity is."""
        if self._standard:
            raise UserError(
                f"block {self.name!r} runs twice in one forward; rule 'pepita' compares two "
                f"forwards layer by layer, so it must run once."
            )
        for layer in self._layers:
            x = layer.nonlinearity(layer.norm(layer.weighted(x)))
            self._standard.append((x, x._version))
        self.num_elements = x.numel()
        return self._downsample(x)

    def learn(self, x: Tensor, *, updates: bool) -> Tensor:
        """The second forward, and every layer's gradients.

        Arguments:
            x: the block's input in it.
            updates: whether to update at once, or to leave that to :meth:`update`.
        """
        for layer, (standard, version) in zip(self._layers, self._standard, strict=True):
            if standard._version != version:
                raise UserError(
                    f"the model writes in place into the output of block {self.name!r}, which rule "
                    f"'pepita' compares with that of a second forward. Let it make a new tensor."
                )
            x = _learn(layer, x, standard)
        self._standard = []
        if updates:
            self.update()
        return self._downsample(x)

    def update(self) -> None:
        """From the gradients that are there."""
        with torch.autocast(next(self.block.parameters()).device.type, enabled=False):
            self._update()

    def abandon(self) -> None:
        self._standard = []


def _learn(layer: Layer, x: Tensor, standard: Tensor) -> Tensor:
    """The layer's activity on the modulated input; its parameters receive their gradients."""
    with torch.enable_grad():
        z = layer.weighted(x.detach())
        normalized = layer.norm(z.detach())
    with torch.no_grad():
        activity: Tensor = layer.nonlinearity(normalized.detach())
        difference = standard.to(torch.promote_types(standard.dtype, torch.float32)) - activity
        difference /= len(x) * math.prod(z.shape[2:])
        difference = difference.to(z.dtype)
    with torch.autocast(z.device.type, enabled=False):
        for outputs in (z, normalized):
            if outputs.requires_grad:
                outputs.backward(difference)
    return activity


class TwoForwards:
    """For rules that compare a forward of the input with one of a modulated input.

    `nn.Dropout` is the same in both.

    Arguments:
        model: whose blocks the units hold.
        units: in the order of ``named_modules``.
        output_layer: what lies in no block.
        modulator: makes the second input of the first and the error.
        update_order: "layerwise" or "end"; see `rules.Pepita`.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[ModulatedUnit],
        output_layer: OutputLayer,
        modulator: Modulator,
        *,
        update_order: str,
    ) -> None:
        self._model = model
        self._units = units
        self._output_layer = output_layer
        self._modulator = modulator
        self._is_layerwise = update_order == "layerwise"
        dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        self._is_random = any(dropout.p > 0 for dropout in dropouts)
        # Going back to where random numbers were is nothing that a CUDA graph can do.
        self.can_be_graphed = not self._is_random

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        state = self._random_state(images.device)
        with torch.no_grad(), standing_in({u.block: u.observe for u in self._units}):
            logits = not_below_float32(self._model(images))
        with torch.autocast(images.device.type, enabled=False):
            loss, error = self._output_layer.error(logits, labels)
            modulated = self._modulator(images, error * len(images))

        self._restore(state, images.device)
        with (
            standing_in({u.block: self._learning(u) for u in self._units}),
            without_running_statistics(self._model),
        ):
            outputs = self._model(modulated)
        with torch.autocast(images.device.type, enabled=False):
            self._output_layer.learn(outputs, error.to(outputs.dtype))
        if not self._is_layerwise:
            for unit in self._units:
                unit.update()
        return Outcome(logits, loss, {})

    def num_at_a_time(self, num_images: int) -> int:
        return num_images

    def _learning(self, unit: ModulatedUnit) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return unit.learn(x, updates=self._is_layerwise)

        return forward

    def _random_state(self, device: torch.device) -> Tensor | None:
        if not self._is_random:
            return None
        if device.type == "cuda":
            return torch.cuda.get_rng_state(device)
        return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()

    def _restore(self, state: Tensor | None, device: torch.device) -> None:
        if state is None:
            return
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif device.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            torch.set_rng_state(state)
