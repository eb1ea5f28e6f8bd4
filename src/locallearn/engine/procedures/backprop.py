"""Backpropagation of the output's cross-entropy, and its forms that need less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from locallearn.engine.blocks import (
    FrozenRun,
    Inputs,
    bound_forward,
    call_model,
    forwards_through,
    standing_in,
)
from locallearn.engine.procedures.base import (
    Outcome,
    OutputLayer,
    logits_of,
    not_below_float32,
    without_running_statistics,
)
from locallearn.engine.reduction import Updates
from locallearn.errors import UserError
from locallearn.rules import Backprop


class Backpropagation:
    """The gradient of the whole network, in one or several batches.

    Arguments:
        forward: of the model.
        output_layer: here, of all parameters.
        num_batches: into how many a batch is cut, one after the other, before the update; fewer
            where the batch is too small for that, as the last one of an epoch can be.
        smallest: so many images each of them has at least.
        frozen_runs: modules that stay as they are; in front of all that learns they build no graph.
    """

    can_be_graphed = True

    def __init__(
        self,
        forward: Callable[..., Any],
        output_layer: OutputLayer,
        num_batches: int = 1,
        smallest: int = 1,
        frozen_runs: Sequence[FrozenRun] = (),
    ) -> None:
        self._smallest = smallest
        self._standing_in: dict[nn.Module, Callable[..., Any]] = {}
        for run in frozen_runs:
            self._standing_in |= run.forwards(others={})
        self._forward = forward
        self._output_layer = output_layer
        self._num_batches = num_batches

    def __call__(self, images: Inputs, labels: Tensor) -> Outcome:
        num_batches = self._num_parts(len(labels))
        if num_batches > 1:
            return self._accumulate(images, labels, num_batches)
        logits = self._logits(images)
        with torch.autocast(logits.device.type, enabled=False):
            loss = self._output_layer.loss(logits, labels)
            self._output_layer.learn(loss)
        return Outcome(logits.detach(), loss.detach(), {})

    def num_at_a_time(self, num_images: int) -> int:
        return num_images // self._num_parts(num_images)

    def _num_parts(self, num_images: int) -> int:
        return min(self._num_batches, max(1, num_images // self._smallest))

    def _logits(self, images: Inputs) -> Tensor:
        with standing_in(self._standing_in):
            return not_below_float32(logits_of(call_model(self._forward, images)))

    def _accumulate(self, images: Inputs, labels: Tensor, num_batches: int) -> Outcome:
        parts: list[Tensor] = []
        losses: list[Tensor] = []
        for number in range(num_batches):
            first, last = (len(labels) * n // num_batches for n in (number, number + 1))
            logits = self._logits(_part(images, first, last))
            with torch.autocast(logits.device.type, enabled=False):
                loss = self._output_layer.loss(logits, labels[first:last])
                loss = loss * ((last - first) / len(labels))
                self._output_layer.backward(loss)
            losses.append(loss.detach())
            parts.append(logits.detach())
        self._output_layer.update()
        return Outcome(torch.cat(parts), torch.stack(losses).sum(), {})


def _part(images: Inputs, first: int, last: int) -> Inputs:
    return tree_map_only(Tensor, lambda tensor: tensor[first:last], images)


class CheckpointedBackpropagation(Backpropagation):
    """Each block keeps its input alone, and runs again in the backward.

    Arguments:
        model: whose blocks these are.
        blocks: what is run again as a whole.
        output_layer: here, of all parameters.
        frozen_runs: as of :class:`Backpropagation`.

    BatchNorm's running statistics are updated by the first of the two runs.
    """

    can_be_graphed = False  # it goes back to where random numbers were

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        output_layer: OutputLayer,
        frozen_runs: Sequence[FrozenRun] = (),
    ) -> None:
        super().__init__(model.__call__, output_layer)
        # A chain as a whole: its activation may write into what its norm hands on.
        checkpointed: dict[nn.Module, Callable[..., Any]] = {}
        for block in blocks:
            checkpointed |= forwards_through(block, _through_checkpoint(block))
        self._standing_in |= checkpointed
        for run in frozen_runs:
            self._standing_in |= run.forwards(others=checkpointed)


def _through_checkpoint(block: nn.Module) -> Callable[..., Any]:
    inner = bound_forward(block)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the forward, and of its repetition."""
        return nullcontext(), without_running_statistics(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward


class FusedBackpropagation(Backpropagation):
    """Each parameter is updated as soon as its gradient is there, which is then freed.

    Arguments:
        forward: of the model.
        parameters: name -> parameter.
        optimizers: name -> optimizer of that parameter alone.
        output_layer: without an optimizer; only its loss and its updates are used.
        frozen_runs: as of :class:`Backpropagation`.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        parameters: Mapping[str, nn.Parameter],
        optimizers: Mapping[str, Optimizer],
        output_layer: OutputLayer,
        frozen_runs: Sequence[FrozenRun] = (),
    ) -> None:
        super().__init__(forward, output_layer, frozen_runs=frozen_runs)
        self._parameters = parameters
        self._optimizers = optimizers

    def __call__(self, images: Inputs, labels: Tensor) -> Outcome:
        logits = self._logits(images)
        with torch.autocast(logits.device.type, enabled=False):
            loss = self._output_layer.loss(logits, labels)
            # Hooks of this step alone, so that the model is an ordinary one outside.
            handles = [
                parameter.register_post_accumulate_grad_hook(
                    _updating(self._output_layer.updates, self._optimizers[name])  # type: ignore[no-untyped-call]
                )
                for name, parameter in self._parameters.items()
            ]
            try:
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            finally:
                for handle in handles:
                    handle.remove()
        return Outcome(logits.detach(), loss.detach(), {})


def _updating(updates: Updates, optimizer: Optimizer) -> Callable[[Tensor], None]:
    def update(parameter: Tensor) -> None:
        updates.step(optimizer)

    return update


def build_backpropagation(
    rule: Backprop,
    model: nn.Module,
    checkpointed: Sequence[nn.Module],
    output_layer: OutputLayer,
    optimizers: Mapping[str, Optimizer],
    compile_model: bool,
    frozen_runs: Sequence[FrozenRun] = (),
) -> Backpropagation:
    """The form that the rule asks for.

    Arguments:
        rule: says which.
        model: all of whose parameters learn.
        checkpointed: the blocks that "checkpoint" runs again.
        output_layer: of all parameters.
        optimizers: of "fused-optimizer", parameter name -> its own.
        compile_model: run the model through torch.compile.
        frozen_runs: as of :class:`Backpropagation`; a compiled model has none.

    Raises:
        UserError: a form that gains nothing when compiled.
    """
    if compile_model and rule.bp_memory in ("checkpoint", "fused-optimizer"):
        raise UserError(
            f"bp_memory {rule.bp_memory!r} and compile exclude each other: the compiler decides "
            f"itself what a backward keeps and when gradients are there."
        )
    forward = torch.compile(model.forward) if compile_model else model.__call__
    if rule.bp_memory == "checkpoint":
        return CheckpointedBackpropagation(model, checkpointed, output_layer, frozen_runs)
    if rule.bp_memory == "fused-optimizer":
        return FusedBackpropagation(
            forward, output_layer.parameters, optimizers, output_layer, frozen_runs
        )
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    # Of a single image BatchNorm has no variance.
    smallest = 2 if has_norm else 1
    frozen_runs = () if compile_model else frozen_runs
    return Backpropagation(forward, output_layer, rule.num_accumulated, smallest, frozen_runs)
