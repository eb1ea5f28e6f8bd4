"""A network from which an image leaves at the first block whose head is sure of it.

Shapes: N batch, M images that are still in the network, K classes, E exits.

The model's own forward runs, with a stand-in for each exit's block: it asks the block's head, takes
the images that it is sure of out of the batch, and hands on the others alone. So every later layer
computes for fewer images, and the forward is left as soon as there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from locallearn.engine.blocks import (
    Inputs,
    Parts,
    call_model,
    evaluating,
    few,
    forwards_through,
    num_inputs,
    standing_in,
)
from locallearn.engine.procedures import logits_of
from locallearn.engine.procedures.base import not_below_float32
from locallearn.engine.units import GenericUnit
from locallearn.errors import UserError

OUTPUT = "output"
"""The exit behind all blocks: the network's own logits."""

_NUM_TRIED = 3  # images, of which one is taken out; not two: a single one fits any batch
_TOLERANCE = 1e-4  # of logits, relative to the largest


@dataclass(frozen=True)
class Prediction:
    """What an early-exit forward says.

    Attributes:
        probabilities: (N, K), float32: softmax of the logits that each image left with, divided
            by that exit's temperature.
        exits: (N,), int64: the place in ``exit_names`` where each image left.
        exit_names: of the exits in the order of the forward; the last is the network's output.
    """

    probabilities: Tensor
    exits: Tensor
    exit_names: tuple[str, ...]

    @property
    def classes(self) -> Tensor:
        """(N,), int64."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """(N,): the probability of the class."""
        return self.probabilities.amax(dim=1)


class _AllLeft(Exception):  # noqa: N818 - no error: nothing is left to compute
    """Ends the model's forward."""


class EarlyExits:
    """The blocks of a model at which images may leave.

    An exit is a block whose head has logits, and behind which the model computes each image by
    itself: that is tried with three images, of which one is taken out. Where a later layer reads
    what lies before the block too (a skip around it), the block is no exit.

    Arguments:
        model: in evaluation mode whenever it is run here.
        units: its blocks with their heads.
        num_classes: K.
        images: a batch, as the model takes it, on its device.
        names: of the blocks that are to be exits, and no others; all that can be where None.

    Attributes:
        names: of the exits, in the order of the forward, :data:`OUTPUT` at the end.

    Raises:
        UserError: a name that is no exit, or none at all.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[GenericUnit],
        num_classes: int,
        images: Inputs,
        names: Sequence[str] | None = None,
    ) -> None:
        self._model = model
        self._num_classes = num_classes
        candidates = {unit.name: unit for unit in units if unit.has_loss}
        if names is not None and (unknown := [name for name in names if name not in candidates]):
            raise UserError(
                f"{unknown[0]!r} is no block with a head of its own. Those that have one: "
                f"{', '.join(candidates)}."
            )
        sound = self._find(candidates, images)
        if names is not None:
            if lost := [name for name in names if name not in sound]:
                raise UserError(
                    f"images can't leave at block {lost[0]!r}: its head has no logits, or a later "
                    f"layer reads what lies before it too. Exits can be: {', '.join(sound)}."
                )
            sound = {name: unit for name, unit in sound.items() if name in names}
        if not sound:
            raise UserError(
                f"no block of {type(model).__name__} can be an exit: behind each of them a later "
                f"layer reads what lies before it too, or its head has no logits."
            )
        self._units = sound
        self.names = (*sound, OUTPUT)

    @torch.no_grad()
    def logits(self, images: Inputs) -> dict[str, Tensor]:
        """Exit name -> logits (N, K), not below float32, of a forward that no image leaves."""
        with _recording(self._units, num_inputs(images)) as logits:
            output = logits_of(call_model(self._model, images))
        return {**logits, OUTPUT: not_below_float32(output)}

    @torch.no_grad()
    def num_macs(self, images: Inputs) -> dict[str, int]:
        """Exit name -> multiply-accumulates of an image that leaves there: of all layers and heads
        that it has come by (matrix products, convolutions, attention; torch's own counter).

        Arguments:
            images: a batch.
        """
        num = num_inputs(images)
        with FlopCounterMode(display=False) as counter:
            noted: dict[str, int] = {}

            def note(name: str) -> None:
                noted[name] = counter.get_total_flops() // (2 * num)

            with _recording(self._units, num, note):
                call_model(self._model, images)
            note(OUTPUT)
        return noted

    @torch.no_grad()
    def predict(
        self, images: Inputs, threshold: float, temperatures: Mapping[str, float]
    ) -> Prediction:
        """Each image by the first exit whose probability of a class is at least the threshold.

        The host waits for the device at each exit, to know who is left.

        Arguments:
            images: as the model takes them, on its device.
            threshold: in [0, 1]; at 0 all leave at the first exit, and above 1 none does.
            temperatures: exit name -> what its logits are divided by; 1 where it is not named.
        """
        num = num_inputs(images)
        reference = next(self._model.parameters())
        probabilities = torch.empty(num, self._num_classes, device=reference.device)
        exits = torch.full((num,), len(self._units), device=reference.device)
        inside = torch.arange(num, device=reference.device)

        def leave(place: int, unit: GenericUnit) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                num_inside = len(inside)
                logits, output = unit.infer(num_inside, *args, **kwargs)
                assert logits is not None
                answers = (logits.float() / temperatures.get(unit.name, 1.0)).softmax(dim=1)
                stays = answers.amax(dim=1) < threshold
                rows = stays.nonzero()[:, 0]
                if len(rows) == num_inside:
                    return output
                leaving = inside[~stays]
                probabilities[leaving] = answers[~stays]
                exits[leaving] = place
                inside = inside[rows]
                if not len(rows):
                    raise _AllLeft
                return _rows_of(output, unit, num_inside, rows)

            return forward

        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for place, unit in enumerate(self._units.values()):
            forwards |= forwards_through(unit.block, leave(place, unit))
        try:
            with standing_in(forwards):
                logits = logits_of(call_model(self._model, images)).float()
            probabilities[inside] = (logits / temperatures.get(OUTPUT, 1.0)).softmax(dim=1)
        except _AllLeft:
            pass
        return Prediction(probabilities, exits, self.names)

    @torch.no_grad()
    def _find(
        self, candidates: Mapping[str, GenericUnit], images: Inputs
    ) -> dict[str, GenericUnit]:
        """Those behind which the logits of two images are the same without the third, in the order
        of the forward."""
        tried = _three(images)
        num = num_inputs(tried)
        with evaluating(self._model), torch.no_grad():
            with _recording(candidates, num) as logits:
                whole = logits_of(call_model(self._model, tried))
            kept = torch.tensor([0, 2], device=whole.device)
            sound = {}
            for name in logits:
                unit = candidates[name]
                left = self._without_one(unit, tried, kept)
                if left is None or left.shape != whole[kept].shape:
                    continue
                scale = whole.abs().amax().clamp(min=1.0)
                if bool(((left - whole[kept]).abs() <= _TOLERANCE * scale).all()):
                    sound[name] = unit
        return sound

    def _without_one(self, unit: GenericUnit, images: Inputs, kept: Tensor) -> Tensor | None:
        """The logits where the others than those kept leave at a block; None where that fails."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            _, output = unit.infer(_NUM_TRIED, *args, **kwargs)
            return _rows_of(output, unit, _NUM_TRIED, kept)

        try:
            with standing_in(forwards_through(unit.block, forward)):
                return logits_of(call_model(self._model, images))
        except Exception:  # whatever a layer says against another number of images
            return None


@contextmanager
def _recording(
    units: Mapping[str, GenericUnit],
    num_images: int,
    note: Callable[[str], None] = lambda name: None,
) -> Iterator[dict[str, Tensor]]:
    """Within: a forward of the model leaves the blocks' logits here, in its order; of heads without
    logits, nothing. Each block's name is noted once its head has run."""
    recorded: dict[str, Tensor] = {}

    def record(unit: GenericUnit) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            logits, output = unit.infer(num_images, *args, **kwargs)
            if logits is not None:
                recorded[unit.name] = logits
            note(unit.name)
            return output

        return forward

    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for unit in units.values():
        forwards |= forwards_through(unit.block, record(unit))
    with standing_in(forwards):
        yield recorded


def _rows_of(output: Any, unit: GenericUnit, num_images: int, rows: Tensor) -> Any:
    """A block's output of these images alone, in its memory format."""
    layout = unit.layout
    dim = layout.batch_dim

    def select(tensor: Tensor) -> Tensor:
        if tensor.ndim <= dim or tensor.shape[dim] % num_images != 0:
            return tensor
        num_parts = tensor.shape[dim] // num_images
        if num_parts == 1:
            return _select(tensor, dim, rows)
        parts = torch.arange(num_parts, device=rows.device)
        if layout.parts is Parts.OF_ALL_IMAGES:
            index = parts[:, None] * num_images + rows
        else:
            index = rows[:, None] * num_parts + parts
        return _select(tensor, dim, index.flatten())

    return tree_map_only(Tensor, select, output)


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    # `index_select` would lay channels-last images out anew, which takes ten times as long.
    if dim == 0 and tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(dim, index)


def _three(images: Inputs) -> Inputs:
    """Three images that differ: of the batch, or noise in their shape where it has fewer."""
    num = num_inputs(images)
    if num >= _NUM_TRIED:
        return few(images, _NUM_TRIED)
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != num:
            return tensor
        repeated = tensor[:1].expand(_NUM_TRIED, *tensor.shape[1:])
        if not tensor.is_floating_point():
            return repeated.clone()
        noise = torch.randn(repeated.shape, generator=generator)
        return repeated + noise.to(tensor.device, tensor.dtype)

    return tree_map_only(Tensor, draw, images)
