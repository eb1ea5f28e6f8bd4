"""A training step as one CUDA graph: launched as a whole, without Python in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from locallearn.engine.config import TrainConfig
from locallearn.engine.learner import LocalLearner
from locallearn.engine.optimizers import ScheduleFreeAdamW
from locallearn.engine.results import StepResult
from locallearn.errors import UserError

# Steps that run as they are first: libraries load, kernels compile and optimizers make their
# state, none of which may happen while a graph is captured.
NUM_WARM_UP_STEPS = 3

_Signature = tuple[tuple[torch.Size, torch.dtype], ...]


def can_be_graphed(learner: LocalLearner) -> bool:
    """Whether a step's launches are the same each time, with no number read on the host.

    The other optimizers count their steps on the host, and the batches that a learner holds on to
    for its first inference would be overwritten.
    """
    optimizers = learner.optimizers.values()
    on_cuda = all(p.device.type == "cuda" for p in learner.parameters())
    countless = all(isinstance(o, ScheduleFreeAdamW) for o in optimizers)
    return on_cuda and countless and learner.can_be_graphed and not learner.holds_batches


def is_run_graphed(settings: TrainConfig, learner: LocalLearner, *, is_alone: bool) -> bool:
    """Whether a run captures its steps: not where several processes share them, memory is measured
    or the front of the network is skipped.

    Arguments:
        settings: of the run, resolved.
        learner: that it trains.
        is_alone: whether one process trains it.
    """
    is_whole = settings.memory_limit is None and not settings.feature_cache
    return is_alone and settings.cuda_graph and is_whole and can_be_graphed(learner)


@dataclass
class _Captured:
    """A graph, where it reads, where it writes, and the learner's state that it was made for."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: StepResult
    state_number: int


class GraphedStep:
    """A step, captured once for each shape of its inputs and then replayed.

    Inputs are copied to where the captured step reads them. The first steps of each shape are
    ordinary ones. What a replay returns is overwritten by the next one.

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
        self._device = next(learner.parameters()).device
        self._num_steps: dict[_Signature, int] = {}
        self._captured: dict[_Signature, _Captured] = {}
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Any) -> StepResult:
        tensors, structure = tree_flatten(inputs)
        signature = tuple((t.shape, t.dtype) for t in tensors)
        with torch.cuda.device(self._device):
            # What a step does on the host, a replay does not: the way back from an evaluation, and
            # the writing of a learning rate that was changed.
            if not self._learner.training:
                self._learner.train()
            for optimizer in self._learner.optimizers.values():
                assert isinstance(optimizer, ScheduleFreeAdamW)
                optimizer.write_rates()
            captured = self._captured.get(signature)
            if captured and captured.state_number != self._learner.state_number:
                captured = None  # a state was loaded, so tensors lie elsewhere
                self._num_steps[signature] = 0
                del self._captured[signature]
            if captured is None:
                self._num_steps[signature] = self._num_steps.get(signature, 0) + 1
                if self._num_steps[signature] <= NUM_WARM_UP_STEPS:
                    return self._warm_up(inputs)
                captured = self._capture(tensors, structure)
                self._captured[signature] = captured
            else:
                for static, tensor in zip(captured.inputs, tensors, strict=True):
                    if static is not tensor:
                        static.copy_(tensor)
            captured.graph.replay()
            return captured.result

    def _capture(self, tensors: list[Tensor], structure: TreeSpec) -> _Captured:
        inputs = [t if any(t is r for r in self._resident) else t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local: the threads that load images may allocate pinned memory meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = self._step(tree_unflatten(inputs, structure))
        except torch.OutOfMemoryError:
            raise  # no fault of the rule's
        except RuntimeError as error:
            raise UserError(
                f"the step can't be captured in a CUDA graph ({str(error).splitlines()[0]}): does "
                f"the rule read a value on the host? Train without: --no-cuda-graph."
            ) from error
        return _Captured(graph, inputs, result, self._learner.state_number)

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
