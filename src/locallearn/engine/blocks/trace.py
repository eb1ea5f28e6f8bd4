"""One forward of a model, watched: which modules run, in what order, on which tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from locallearn.errors import UserError

_MAX_TRACED = 3  # images; few dimensions of a tensor are as large by chance

Inputs = Any
"""What a model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments."""


def call_model(forward: Callable[..., Any], inputs: Inputs) -> Any:
    """The forward of a tensor, of a tuple as arguments, or of a dict as keyword arguments."""
    if isinstance(inputs, dict):
        return forward(**inputs)
    if isinstance(inputs, tuple | list):
        return forward(*inputs)
    return forward(inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a tensor, list, tuple, dict or any other pytree."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def num_inputs(inputs: Inputs) -> int:
    """N: the first dimension of the first tensor."""
    tensors = tensors_of(inputs)
    if not tensors or tensors[0].ndim == 0:
        raise UserError("the model's input holds no tensor with a batch dimension.")
    num: int = tensors[0].shape[0]  # no len(), which fixes it where torch.export looks on
    if num == 0:
        raise UserError(f"the batch is empty: its shape is {tuple(tensors[0].shape)}.")
    return num


def few(inputs: Inputs, most: int = _MAX_TRACED) -> Inputs:
    """The first of the batch: as many as a trace needs."""
    return _each_batch(lambda tensor: tensor[:most], inputs)


def rolled(inputs: Inputs) -> Inputs:
    """The same images, each in the next one's place, and the last in the first's."""
    return _each_batch(lambda tensor: tensor.roll(1, 0), inputs)


def _each_batch(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    num = num_inputs(inputs)
    return tree_map_only(Tensor, lambda t: change(t) if t.ndim > 0 and len(t) == num else t, inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, with a graph; afterwards every module's own mode again.

    The graph keeps torch's transformer layers from their fused inference, which runs none of
    their modules.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def foreseeing_failure(inputs: Inputs) -> Iterator[None]:
    """Within: what the model's forward raises is said as the user's concern that it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(inputs))
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"the model's forward fails on the example input of shape {shapes}: {what}. Give an "
            f"example_input (or images) of the shape and dtype that the model takes."
        ) from error


@dataclass
class Seen:
    """A tensor at a moment: the object, and how often it had been written to."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, value: Any) -> list[Seen]:
        return [
            # What inference_mode makes has no version.
            cls(tensor, 0 if tensor.is_inference() else tensor._version)
            for tensor in tensors_of(value)
        ]

    def is_same(self, other: Seen) -> bool:
        return self.tensor is other.tensor and self.version == other.version


@dataclass
class Call:
    """The first call of a module in the forward, and how many there were.

    Attributes:
        name: of the module in the model.
        start: its place in the order of calls.
        inputs: its tensors, when it began.
        outputs: its tensors, when it ended.
        is_leaf: whether no other module ran inside.
        num_calls: in one forward.
        has_grad: whether it ran with gradients, and not under torch.no_grad or inference_mode.
    """

    name: str
    module: nn.Module
    start: int
    inputs: list[Seen]
    outputs: list[Seen] = field(default_factory=list)
    is_leaf: bool = True
    num_calls: int = 1
    has_grad: bool = True


def trace(model: nn.Module, inputs: Inputs) -> dict[str, Call]:
    """Name -> call, of every module that runs in a forward in evaluation mode, by order of start.

    A module that the model holds under several names goes by the first.

    Raises:
        UserError: the forward fails on these inputs, or torch.jit has made a module of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"module {name!r}" if name else "the model"
            raise UserError(
                f"{what} is made by torch.jit, and can be neither watched nor trained "
                f"block by block; give the module from before it was scripted or traced."
            )
    calls: dict[str, Call] = {}
    running: list[str] = []

    def enter(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if running:
                calls[running[-1]].is_leaf = False
            running.append(name)
            if name in calls:
                calls[name].num_calls += 1
            else:
                calls[name] = Call(
                    name,
                    module,
                    len(calls),
                    Seen.of((args, kwargs)),
                    has_grad=torch.is_grad_enabled(),
                )

        return hook

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            if calls[name].num_calls == 1:
                calls[name].outputs = Seen.of(output)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        with evaluating(model), foreseeing_failure(inputs):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def trace_few(model: nn.Module, inputs: Inputs) -> tuple[Inputs, dict[str, Call]]:
    """A trace of the first few of the batch, and these.

    Of the whole batch where the model doesn't run on a few, as one that classifies the nodes of a
    graph does not on some of them.

    Raises:
        UserError: the forward fails on the whole batch too.
    """
    first = few(inputs)
    try:
        return first, trace(model, first)
    except UserError:
        if num_inputs(first) == num_inputs(inputs):
            raise
    return inputs, trace(model, inputs)


def not_of_the_batch(model: nn.Module, inputs: Inputs, calls: dict[str, Call]) -> set[str]:
    """Names of the modules none of whose outputs is larger for more images, or is so by chance:
    of weights that another network makes, or of an expert that only some tokens are sent to.

    Arguments:
        model: any module.
        inputs: what was traced.
        calls: that trace.
    """
    num = num_inputs(inputs)
    if num == 1:
        return set()
    try:
        fewer = trace(model, few(inputs, num - 1))
    except UserError:
        return set()  # it takes this many and no other
    return {
        name
        for name, call in calls.items()
        if name in fewer and not _grows(call.outputs, fewer[name].outputs, num)
    }


def _grows(outputs: list[Seen], of_fewer: list[Seen], num: int) -> bool:
    """Whether a dimension of an output is in proportion to the images: ``num``, and one fewer."""
    return any(
        large == small * num // (num - 1) and small % (num - 1) == 0 and small > 0
        for output, fewer in zip(outputs, of_fewer, strict=False)
        for large, small in zip(output.tensor.shape, fewer.tensor.shape, strict=False)
    )
