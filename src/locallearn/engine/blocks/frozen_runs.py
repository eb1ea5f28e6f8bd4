"""Frozen modules that run one straight after the other, a few images at a time.

In evaluation mode no image knows of another, so that what frozen modules hold on their way need not
grow with the batch: only what goes in and what comes out does. The more modules run in one go, the
fewer tensors of the whole batch lie between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.engine.blocks.chain import Chain, forwards_through
from locallearn.engine.blocks.standing_in import standing_in
from locallearn.engine.blocks.trace import (
    Call,
    Inputs,
    call_model,
    evaluating,
    num_inputs,
    tensors_of,
    trace_few,
)
from locallearn.engine.measuring import mark
from locallearn.errors import UserError

FROZEN, BEHIND_FROZEN = "frozen", "behind frozen"  # marks in a timeline

# Of the largest tensor of a slice: large enough for the kernels to be busy. At 224 pixels a stage
# of a ResNet has 3 MiB an image; of 32 pixels tens of images go at once.
_SLICE_BYTES = {"cpu": 2**22}
_SLICE_BYTES_ELSEWHERE = 2**25


@dataclass
class FrozenRun:
    """Modules of a model, each of which reads what the one before yields, and nothing else does.

    Attributes:
        names: of the modules in the model, in the order of the forward.
        chain: the modules.
        bytes_per_image: of the largest tensor that they, or modules inside them, take or yield.
    """

    names: tuple[str, ...]
    chain: Chain
    bytes_per_image: int

    def forwards(
        self, others: Mapping[nn.Module, Callable[..., Any]] | None = None
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Module -> what stands in for its forward: the first runs all, slice by slice, without
        a graph; the others pass on what they get.

        Arguments:
            others: None where no gradient leads through the run. Else what stands in for its
                modules, or some of them, where one does.
        """
        steps: list[Callable[..., Any]] | None = None
        if others is not None:
            steps = [others.get(module, module.forward) for module in self.chain.members]
        return forwards_through(self.chain, _RunOfFrozen(self, steps))

    def in_slices(self, x: Tensor) -> Tensor:
        """What the run makes of a batch, without a graph."""
        # A part of its own in a timeline: how many slices there are goes by the batch.
        mark(FROZEN)
        with torch.no_grad():
            output = self._sliced(x.detach())
        mark(BEHIND_FROZEN)
        return output

    def _sliced(self, x: Tensor) -> Tensor:
        largest = _SLICE_BYTES.get(x.device.type, _SLICE_BYTES_ELSEWHERE)
        size = max(1, largest // max(1, self.bytes_per_image))
        if len(x) <= size:
            whole: Tensor = self.chain(x)
            return whole
        output: Tensor | None = None
        for first in range(0, len(x), size):
            part = self.chain(x[first : first + size])
            if output is None:
                output = _empty_like(part, len(x))
            output[first : first + size] = part
            del part
        assert output is not None
        return output


class _RunOfFrozen:
    """What stands in for the first module of a run: an object, to be copied with its learner.

    Arguments:
        run: of frozen modules.
        steps: what its modules are, one by one, where a gradient leads through them; None where
            none ever does.
    """

    def __init__(self, run: FrozenRun, steps: Sequence[Callable[..., Any]] | None) -> None:
        self._run, self._steps = run, steps

    def __call__(self, x: Tensor) -> Tensor:
        if self._steps is not None and torch.is_grad_enabled() and x.requires_grad:
            for step in self._steps:
                x = step(x)
            return x
        return self._run.in_slices(x)


class WithoutGraph:
    """A forward that builds no graph: an object, which can be copied with its learner."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._forward(*args, **kwargs)


def _empty_like(part: Tensor, num_images: int) -> Tensor:
    """For so many images, laid out as a part is."""
    is_last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
    shape = (num_images, *part.shape[1:])
    layout = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)


def find_runs(
    model: nn.Module, inputs: Inputs, frozen: Sequence[nn.Module], loose: Set[str]
) -> list[FrozenRun]:
    """The runs of a model, such as a trace shows them and a trial confirms.

    Arguments:
        model: any module; stays as it is.
        inputs: a batch, of which the first few are run through the model.
        frozen: the modules of the frozen blocks.
        loose: names of modules in no block, that frozen blocks alone read.
    """
    inputs, calls = trace_few(model, inputs)
    num_images = num_inputs(inputs)
    expected = [seen.tensor.detach() for seen in calls[""].outputs]
    parts = set(frozen)
    outer: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in parts or (name in loose and name in calls and module not in outer):
            parts.add(module)
            outer |= set(module.modules()) - {module}
    steps = [c for c in calls.values() if c.module in parts and c.module not in outer]
    runs: list[list[Call]] = []
    for call in sorted(steps, key=lambda call: call.start):
        if not _is_simple(call, num_images):
            continue
        if runs and call.inputs[0].is_same(runs[-1][-1].outputs[0]):
            runs[-1].append(call)
        else:
            runs.append([call])
    # A module in no block is no use alone.
    runs = [run for run in runs if any(call.module in set(frozen) for call in run)]
    found = [
        FrozenRun(
            tuple(call.name for call in run),
            Chain([call.module for call in run]),
            max(_bytes(call) for call in _within(run, calls)) // num_images,
        )
        for run in runs
    ]
    if _gives_same(model, inputs, found, expected):
        return found
    return [run for run in found if _gives_same(model, inputs, [run], expected)]


def _is_simple(call: Call, num_images: int) -> bool:
    """Whether a module takes one tensor, makes one, each with an entry for every image, runs once,
    and has no hooks, which a run would pass by."""
    module = call.module
    return (
        call.num_calls == 1
        and len(call.inputs) == len(call.outputs) == 1
        and all(
            seen.tensor.ndim > 1 and len(seen.tensor) == num_images
            for seen in (*call.inputs, *call.outputs)
        )
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _within(run: Sequence[Call], calls: Mapping[str, Call]) -> list[Call]:
    """The calls of a run's modules, and of those inside them."""
    inside = {inner for call in run for inner in call.module.modules()}
    return [call for call in calls.values() if call.module in inside]


def _bytes(call: Call) -> int:
    seen = (*call.inputs, *call.outputs)
    return max((each.tensor.numel() * each.tensor.element_size() for each in seen), default=0)


def _gives_same(
    model: nn.Module, inputs: Inputs, runs: Sequence[FrozenRun], expected: Sequence[Tensor]
) -> bool:
    """Whether the model yields the same when these run in one go, image by image."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for run in runs:
        forwards |= FrozenRun(run.names, run.chain, _SLICE_BYTES_ELSEWHERE).forwards()
    try:
        with evaluating(model), torch.no_grad(), standing_in(forwards):
            outputs = tensors_of(call_model(model, inputs))
    except (UserError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(outputs, expected, strict=True)
    )
