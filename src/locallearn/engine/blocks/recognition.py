"""Which blocks the closed form covers, of this package's make or of any other.

A convolution or linear layer without a copy of itself elsewhere, BatchNorm, and (Leaky)ReLU or
nothing, with a max-pool behind or not; or such a layer in front of a pointwise convolution, as in
a depthwise-separable block. Blocks of the package say what they are made of; of others, `torch.fx`
tells what their forward does, whether it calls modules or functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from locallearn.engine.blocks.chain import Chain
from locallearn.engine.blocks.standing_in import bound_forward
from locallearn.models import Block, ConvBlock, DepthwiseSeparableBlock, LinearBlock

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_LAYERS = (nn.Conv2d, nn.Linear)
_NO_ACTIVATION = 1.0  # the slope with which a LeakyReLU does nothing
_MAX_MODULES = 12  # of a block that is worth looking into

Relu = float
"""A (Leaky)ReLU: its negative slope."""


@dataclass(frozen=True)
class NormalizedLayer:
    """``leaky_relu(norm(layer(x)), negative_slope)``."""

    layer: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm1d | nn.BatchNorm2d
    negative_slope: float

    def forward(self) -> Callable[[Tensor], Tensor]:
        """The function, of the modules' forwards as they are now."""
        norm, slope = bound_forward(self.norm), self.negative_slope
        layer = self.layer.forward
        if isinstance(getattr(self.norm, "act", None), nn.Module):
            return lambda x: norm(layer(x))  # timm's norm has its activation inside
        if slope == _NO_ACTIVATION:
            return lambda x: norm(layer(x))
        return lambda x: F.leaky_relu(norm(layer(x)), slope)


@dataclass(frozen=True)
class ClosedForm:
    """What a block is made of, where the closed form covers it.

    Arguments:
        last: the layer whose activation the head reads.
        inner: the one before it, in a block of two.
        max_pool: window and stride of the max-pool behind; 1 for none.
    """

    last: NormalizedLayer
    inner: NormalizedLayer | None = None
    max_pool: int = 1


@dataclass(frozen=True)
class Halves:
    """A block cut where its head reads: ``block(x) == downsample(activation(x))``.

    Arguments:
        activation: what the head reads, made of the block's inputs.
        downsample: what is handed on, made of it; None where they are the same.
    """

    activation: Callable[..., Any]
    downsample: Callable[[Tensor], Tensor] | None = None


def cut_at_head(block: nn.Module, *, head_after_pool: bool = False) -> Halves:
    """The halves of a block, as its forward is now: the head reads what lies before a max-pool.

    Arguments:
        block: the module.
        head_after_pool: the head reads the block's output instead.
    """
    if head_after_pool:
        return Halves(bound_forward(block))
    if isinstance(block, Block):
        return Halves(block.activation, block.downsample)
    form = recognize(block)
    if form is None or form.max_pool == 1:
        return Halves(bound_forward(block))
    inner = None if form.inner is None else form.inner.forward()
    last, size = form.last.forward(), form.max_pool

    def activation(x: Tensor) -> Tensor:
        return last(x if inner is None else inner(x))

    return Halves(activation, lambda h: F.max_pool2d(h, size))


def recognize(block: nn.Module) -> ClosedForm | None:
    """What the closed form needs of a block, or None where it does not cover it.

    A hook, patch or parametrization on one of the parts would be passed over, a subclass may
    compute something else, and a BatchNorm without scale, or that averages without end, is
    another: these take the generic path.
    """
    if isinstance(block, Block):
        steps = _steps_of_own(block)
    elif isinstance(block, Chain):
        steps = list(block.members)
    else:
        steps = _steps_of_other(block)
    return None if steps is None else _parse(steps)


def _steps_of_own(block: Block) -> list[nn.Module | Relu] | None:
    if type(block) not in (ConvBlock, LinearBlock, DepthwiseSeparableBlock):
        return None
    if not _is_plain(block, "activation", "downsample"):
        return None
    steps: list[nn.Module | Relu] = [part for layer in block.layers() for part in layer]
    return [*steps, block.pool]


def _steps_of_other(block: nn.Module) -> list[nn.Module | Relu] | None:
    modules = list(block.modules())
    num_layers = sum(isinstance(module, _LAYERS) for module in modules)
    num_norms = sum(isinstance(module, NORMS) for module in modules)
    if num_layers not in (1, 2) or num_layers != num_norms or len(modules) > _MAX_MODULES:
        return None
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return None
    if not all(_is_plain(module) for module in modules if module is not block):
        return None
    if "forward" in vars(block):
        return None
    try:
        with _training(block):
            graph = _LayerTracer().trace(block)
    except Exception:  # control flow that depends on data, or whatever else a forward may do
        return None
    return _steps_of_graph(graph, block)


@contextlib.contextmanager
def _training(block: nn.Module) -> Iterator[None]:
    """Within: training mode, of which the closed form is, whatever the block does in another."""
    modes = {module: module.training for module in block.modules()}
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _LayerTracer(fx.Tracer):
    """Looks into every module but torch's own layers, and what is made of a BatchNorm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NORMS) or super().is_leaf_module(m, module_qualified_name)


def _steps_of_graph(graph: fx.Graph, block: nn.Module) -> list[nn.Module | Relu] | None:
    """The modules and ReLUs of a graph that is a straight line; None of any other."""
    steps: list[nn.Module | Relu] = []
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is not None:
                return None  # of several inputs
        elif last is None or node.args[:1] != (last,) or list(node.all_input_nodes) != [last]:
            return None
        elif node.op == "call_module":
            steps.append(block.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            slope = _slope_of_call(node)
            if slope is None:
                return None
            steps.append(slope)
        elif node.op != "output":
            return None
        last = node
    return steps


def _slope_of_call(node: fx.Node) -> Relu | None:
    """The negative slope where a node is a ReLU or LeakyReLU."""
    if node.target in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"):
        return 0.0
    if node.target in (F.leaky_relu, F.leaky_relu_):
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return float(slope) if isinstance(slope, int | float) else None
    return None


def _parse(steps: Sequence[nn.Module | Relu]) -> ClosedForm | None:
    left = [step for step in steps if not _does_nothing(step)]
    inner: NormalizedLayer | None = None
    last = _take_layer(left)
    if last is not None and left and isinstance(left[0], nn.Conv2d):
        inner, last = last, _take_layer(left)
        if last is None or not _is_pointwise(last.layer) or not isinstance(inner.layer, nn.Conv2d):
            return None
    if last is None:
        return None
    max_pool = 1
    if left and isinstance(left[0], nn.MaxPool2d) and _is_usual_pool(left[0]):
        max_pool = int(left.pop(0).kernel_size)  # type: ignore[union-attr,arg-type]
    return None if left else ClosedForm(last, inner, max_pool)


def _take_layer(left: list[nn.Module | Relu]) -> NormalizedLayer | None:
    """Layer, norm and activation off the front; None, and nothing taken, where they are not."""
    if len(left) < 2 or not _is_plain_layer(left[0]) or not _is_usual_norm(left[1]):
        return None
    layer, norm = left[0], left[1]
    is_linear = isinstance(layer, nn.Linear)
    if is_linear != isinstance(norm, nn.BatchNorm1d):
        return None
    slope = _slope_inside(norm)
    taken = 2
    if slope is None and len(left) > 2:
        slope = _slope_of(left[2])
        taken += slope is not None
    del left[:taken]
    slope = _NO_ACTIVATION if slope is None else slope
    return NormalizedLayer(layer, norm, slope)  # type: ignore[arg-type]


def _slope_of(step: nn.Module | Relu) -> Relu | None:
    if isinstance(step, float):
        return step
    if not _is_plain(step) or type(step) not in (nn.ReLU, nn.LeakyReLU):
        return None
    return float(getattr(step, "negative_slope", 0.0))


def _does_nothing(step: nn.Module | Relu) -> bool:
    is_no_dropout = isinstance(step, nn.modules.dropout._DropoutNd) and step.p == 0
    return type(step) is nn.Identity or is_no_dropout


def _is_plain(part: nn.Module, *methods: str) -> bool:
    """Whether a module computes what its class does: no hook of its parts, no patched method."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    # The block's own hooks run around its step; those of its parts would not.
    is_hooked = not methods and any(hooks)
    return not is_hooked and not any(name in vars(part) for name in ("forward", *methods))


def _is_plain_layer(part: nn.Module | Relu) -> bool:
    if not isinstance(part, _LAYERS) or type(part) not in _LAYERS or not _is_plain(part):
        return False
    is_padded = isinstance(part, nn.Conv2d) and isinstance(part.padding, str)
    return getattr(part, "padding_mode", "zeros") == "zeros" and not is_padded


def _is_pointwise(part: nn.Module) -> bool:
    if not isinstance(part, nn.Conv2d):
        return False
    geometry = (part.kernel_size, part.stride, part.padding, part.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1)


def _is_usual_norm(part: nn.Module | Relu) -> bool:
    if not isinstance(part, NORMS) or not _is_plain(part):
        return False
    is_norm = type(part) in NORMS or _slope_inside(part) is not None
    return is_norm and bool(part.affine) and part.momentum is not None


def _slope_inside(norm: nn.Module | Relu) -> Relu | None:
    """Of timm's BatchNorm with an activation inside: its slope; None of any other norm."""
    kind = type(norm)
    if (kind.__module__, kind.__name__) != ("timm.layers.norm_act", "BatchNormAct2d"):
        return None
    assert isinstance(norm, nn.Module)
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    if not _does_nothing(drop):
        return None
    return _NO_ACTIVATION if type(act) is nn.Identity else _slope_of(act)


def _is_usual_pool(part: nn.MaxPool2d) -> bool:
    return (
        type(part) is nn.MaxPool2d
        and _is_plain(part)
        and isinstance(part.kernel_size, int)
        and (part.stride, part.padding, part.dilation) == (part.kernel_size, 0, 1)
        and not part.ceil_mode
        and not part.return_indices
    )
