"""A training step as one CUDA graph: launched as a whole, without Python in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from locallearn.engine.learner import LocalLearner, StepResult
from locallearn.engine.optimizers import ScheduleFreeAdamW

# Steps that run as they are first: libraries load, kernels compile and optimizers make their
# state, none of which may happen while a graph is captured.
_NUM_WARM_UP_STEPS = 3


def can_be_graphed(learner: LocalLearner) -> bool:
    """Whether a step's launches are the same each time, with no number read on the host.

    The other optimizers count their steps on the host.
    """
    optimizers = learner.optimizers.values()
    on_cuda = all(p.device.type == "cuda" for p in learner.parameters())
    return on_cuda and all(isinstance(o, ScheduleFreeAdamW) for o in optimizers)


class GraphedStep:
    """A step, captured once and then replayed.

    Inputs are copied to where the captured step reads them; inputs of other shapes (the smaller
    last batch of an epoch) take an ordinary step. What a replay returns is overwritten by the next
    one.

    Arguments:
        learner: whose step it is; see :func:`can_be_graphed`.
        make: from the inputs to images and labels, captured too; by default the inputs are these.
        resident: inputs that are the same tensors at every step, and are read where they lie.
    """

    def __init__(
        self,
        learner: LocalLearner,
        make: Callable[..., tuple[Tensor, Tensor]] | None = None,
        resident: Sequence[Tensor] = (),
    ) -> None:
        assert can_be_graphed(learner), "see can_be_graphed"
        self._learner = learner
        self._make = make
        self._resident = resident
        self._num_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._inputs: list[Tensor] = []
        self._result: StepResult | None = None

    def __call__(self, *inputs: Any) -> StepResult:
        tensors, structure = tree_flatten(inputs)
        if self._graph is not None:
            if not self._fits(tensors):
                return self._step(inputs)
            for static, tensor in zip(self._inputs, tensors, strict=True):
                if static is not tensor:
                    static.copy_(tensor)
            self._graph.replay()
            assert self._result is not None
            return self._result
        if self._num_steps < _NUM_WARM_UP_STEPS:
            self._num_steps += 1
            return self._warm_up(inputs)
        self._inputs = [t if any(t is r for r in self._resident) else t.clone() for t in tensors]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._result = self._step(tree_unflatten(self._inputs, structure))
        self._graph.replay()
        return self._result

    def _fits(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._inputs) and all(
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(tensors, self._inputs, strict=True)
        )

    def _warm_up(self, inputs: tuple[Any, ...]) -> StepResult:
        """On the stream that will capture, as the documentation of CUDA graphs asks."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _step(self, inputs: tuple[Any, ...]) -> StepResult:
        images, labels = inputs if self._make is None else self._make(*inputs)
        return self._learner.step(images, labels)
