"""The frozen front of a network: what runs before the first thing that learns.

What it makes of an image never changes, so it can be made once and kept. `FrozenFront.made` makes
it; within `FrozenFront.skipped` the model takes it in place of the images, and goes on from there.

    the model's forward      conv1 -> bn1 -> layer1 -> layer2 -> layer3 -> layer4 -> fc
    layer3 learns first      [     stand-ins: empty outputs    ]  ^
                                                     what was made goes in here

The forward itself runs as it is written: of the modules in front, each yields an output of the
right shape without content, and costs nothing; what the forward does between them it does on these;
and the first module that learns is given what was made, whatever reaches it. So any model will do
whose part behind reads nothing in front but that one tensor. Whether this is so is checked on real
images, not guessed.

Shapes: N batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from locallearn.engine.blocks.trace import evaluating
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError

# Two sizes of a batch, from which the shapes for any other follow.
_BATCHES = (2, 3)
_RANDOM = ("Dropout", "StochasticDepth", "DropPath", "DropBlock")
_ADVICE = "Leave --cache out: the frozen blocks then run at every step."


class _Reached(Exception):  # noqa: N818 - no error
    """What the cut gets has been seen; the rest of the forward is not needed."""


@dataclass(frozen=True)
class _Size:
    """A dimension: ``per_image`` times the batch, or fixed."""

    per_image: Fraction | None
    fixed: int

    def of(self, num: int) -> int:
        return self.fixed if self.per_image is None else int(self.per_image * num)


@dataclass(frozen=True)
class _Like:
    """A tensor of such a shape, for any batch."""

    sizes: tuple[_Size, ...]
    dtype: torch.dtype

    def empty(self, num: int, device: torch.device) -> Tensor:
        """One value, seen as often as it takes: no memory is used."""
        value = torch.zeros((), dtype=self.dtype, device=device)
        return value.expand([size.of(num) for size in self.sizes])


@dataclass
class _Frame:
    """A call that is going on, and the calls within it that are over."""

    module: nn.Module
    over: list[tuple[nn.Module, Any]] = field(default_factory=list)


@dataclass
class _Trace:
    """What a forward showed.

    Arguments:
        cut: the first module that learns.
        place: which leaf of its arguments is a tensor.
        feature: that tensor.
        over: calls that were over when it began and lay in no other such: module, output.
        started: all modules whose calls had begun by then.
    """

    cut: nn.Module
    place: int
    feature: Tensor
    over: list[tuple[nn.Module, Any]]
    started: set[nn.Module]


class FrozenFront:
    """What runs before the first thing that learns, made by :func:`find_front`.

    Arguments:
        learner: whose model it is.
        cut_name: name of the module that it ends before.
        feature_shape: of what it makes of an image.
        feature_dtype: of that.
        state_names: of the model's parameters and buffers that it may read.
        num_modules: that are passed over.
    """

    def __init__(
        self,
        learner: LocalLearner,
        trace: _Trace,
        outputs: dict[nn.Module, list[Any]],
        image_shape: torch.Size,
    ) -> None:
        names = {module: name for name, module in learner.model.named_modules()}
        self.learner = learner
        self.cut_name = names[trace.cut]
        self.feature_shape = tuple(trace.feature.shape[1:])
        self.feature_dtype = trace.feature.dtype
        frozen = {n for n, p in learner.model.named_parameters() if not p.requires_grad}
        frozen |= {n for n, _ in learner.model.named_buffers()}
        owners = {names[module] for module in trace.started}
        self.state_names = tuple(
            name
            for name in learner.model.state_dict()
            if name in frozen and name.rpartition(".")[0] in owners
        )
        self.num_modules = len(outputs)
        self._cut = trace.cut
        self._place = trace.place
        self._outputs = outputs
        self._image_shape = image_shape
        self._features: Tensor | None = None
        self._is_behind = False
        self._num_calls: dict[nn.Module, int] = {}

    def made(self, images: Tensor) -> Tensor:
        """What the front makes of images, (N, *feature_shape), in evaluation mode."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(tree_leaves((args, kwargs))[self._place])
            raise _Reached

        handle = self._cut.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with evaluating(self.learner.model), contextlib.suppress(_Reached):
                self.learner.infer(images)
        finally:
            handle.remove()
        return seen[0]

    @contextlib.contextmanager
    def skipped(self) -> Iterator[None]:
        """Within: the model, and so the learner, takes what :meth:`made` makes for images."""
        model = self.learner.model
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._cut.register_forward_pre_hook(self._hand_over, with_kwargs=True),
        ]
        # Not the modules' forwards: the learner has some of its own stand in for those of blocks.
        # This is what nn.Module.compile sets, and what a call of a module looks for first.
        before = {module: module._compiled_call_impl for module in self._outputs}
        try:
            for module in self._outputs:
                module._compiled_call_impl = self._stand_in(module)
            yield
        finally:
            for module, call in before.items():
                module._compiled_call_impl = call
            for handle in handles:
                handle.remove()

    def check(self, images: Tensor) -> None:
        """Raises UserError where the model does not yield the same without its front.

        Arguments:
            images: a few.
        """
        model = self.learner.model
        with evaluating(model):
            expected = self.learner.infer(images)
        features = self.made(images)
        try:
            with evaluating(model), self.skipped():
                found = self.learner.infer(features)
        except Exception as error:  # whatever a forward does with tensors without content
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"the frozen blocks before {self.cut_name!r} can't be passed over: {what}. "
                f"{_ADVICE}"
            ) from error
        tolerance = 1e-4 if self.learner.precision == "fp32" else 3e-2
        scale = float(expected.abs().max())
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else 1e9
        if not difference <= tolerance * max(scale, 1e-3):
            raise UserError(
                f"what follows {self.cut_name!r} in this model reads more than its input: without "
                f"the frozen blocks in front the logits differ by {difference:.2g}. {_ADVICE}"
            )

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        (features,) = tree_leaves((args, kwargs))
        self._features, self._is_behind = features, False
        self._num_calls.clear()
        one = torch.zeros((), device=features.device)
        return (one.expand(len(features), *self._image_shape),), {}

    def _hand_over(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._is_behind:
            return args, kwargs
        leaves, structure = tree_flatten((args, kwargs))
        leaves[self._place] = self._features
        self._features, self._is_behind = None, True
        args, kwargs = tree_unflatten(leaves, structure)
        return args, kwargs

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        call = module._compiled_call_impl or module._call_impl
        outputs = self._outputs[module]

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self._is_behind:
                return call(*args, **kwargs)
            assert self._features is not None
            number = self._num_calls.get(module, 0)
            self._num_calls[module] = number + 1
            num, device = len(self._features), self._features.device
            return tree_map_only(_Like, lambda like: like.empty(num, device), outputs[number])

        return stand_in


def find_front(learner: LocalLearner, images: Tensor) -> FrozenFront:
    """What runs before the first thing that learns, checked on images.

    Arguments:
        learner: with its final weights; stays as it is.
        images: three at least, on its device.

    Raises:
        UserError: nothing is frozen in front, or it can't be passed over.
    """
    model = learner.model
    small, large = (_trace(learner, images[:num]) for num in _BATCHES)
    if small.cut is not large.cut or len(small.over) != len(large.over):
        raise _unfit(learner, small.cut, "its forward does other things for other batches")
    features = (small.feature, large.feature)
    if not small.over:
        raise UserError(
            f"--cache keeps what frozen blocks in front make, and nothing is frozen before "
            f"{_name(model, small.cut)!r}, which learns. Leave --cache out, or freeze the first "
            f"blocks (--trained-blocks, or a smaller --memory-limit)."
        )
    sizes = [_sizes(*shapes) for shapes in zip(*(f.shape for f in features), strict=True)]
    is_batch = [size is not None and size.per_image is not None for size in sizes]
    if not is_batch or is_batch != [True, *[False] * (len(sizes) - 1)]:
        raise _unfit(learner, small.cut, "what it reads has no batch in its first dimension")
    outputs: dict[nn.Module, list[Any]] = {}
    for (module, one), (other, two) in zip(small.over, large.over, strict=True):
        if module is not other:
            raise _unfit(learner, small.cut, "its forward does other things for other batches")
        outputs.setdefault(module, []).append(_like(learner, small.cut, one, two))
    _check_modes(learner, small.started, small.cut)
    front = FrozenFront(learner, small, outputs, images.shape[1:])
    front.check(images[: max(_BATCHES) + 1])
    return front


@torch.no_grad()
def _trace(learner: LocalLearner, images: Tensor) -> _Trace:
    model = learner.model
    learning = {module for modules in learner.block_modules.values() for module in modules}
    root = _Frame(nn.Identity())
    stack = [root]
    started: set[nn.Module] = set()
    found: list[_Trace] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not found:
            own = module.parameters(recurse=False)
            if module in learning or any(p.requires_grad for p in own):
                found.append(_cut_at(learner, module, (args, kwargs), stack, started))
            started.add(module)
        stack.append(_Frame(module))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = stack.pop()
        assert frame.module is module
        if not found:
            shapes = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), output)
            stack[-1].over.append((module, shapes))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        with evaluating(model):
            learner.infer(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError("--cache: nothing in the model's forward learns; leave it out.")
    return found[0]


def _cut_at(
    learner: LocalLearner,
    module: nn.Module,
    arguments: Any,
    stack: list[_Frame],
    started: set[nn.Module],
) -> _Trace:
    leaves = tree_leaves(arguments)
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        raise _unfit(learner, module, f"it reads {len(tensors)} tensors, and one is expected")
    over = [call for frame in stack for call in frame.over]
    feature = leaves[tensors[0]]
    return _Trace(module, tensors[0], feature, over, set(started))


def _check_modes(learner: LocalLearner, started: set[nn.Module], cut: nn.Module) -> None:
    """Raises UserError where what runs in front differs from step to step in training."""
    was_training = {module: module.training for module in learner.model.modules()}
    for module in started:
        if next(module.children(), None) is not None or not was_training[module]:
            continue
        kind = type(module).__name__
        probability = getattr(module, "p", getattr(module, "drop_prob", 1.0))
        is_random = kind.startswith(_RANDOM) and bool(probability)
        if is_random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            name = _name(learner.model, module)
            raise _unfit(learner, cut, f"{kind} {name!r} in front of it is not frozen")


def _sizes(a: int, b: int) -> _Size | None:
    """A dimension from those of two batches; None where it does not grow with them."""
    if a == b:
        return _Size(None, a)
    first, second = _BATCHES
    per_image = Fraction(a, first)
    return _Size(per_image, 0) if per_image * second == b else None


def _like(learner: LocalLearner, cut: nn.Module, one: Any, two: Any) -> Any:
    """An output as it is for any batch: tensors as `_Like`, all else as it was."""

    def join(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        sizes = [_sizes(*pair) for pair in zip(a.shape, b.shape, strict=True)]
        known = tuple(size for size in sizes if size is not None)
        if len(known) != len(sizes):
            raise _unfit(learner, cut, "a shape in front does not grow with the batch")
        return _Like(known, a.dtype)

    return tree_map(join, one, two)


def _unfit(learner: LocalLearner, cut: nn.Module, why: str) -> UserError:
    return UserError(
        f"the frozen blocks before {_name(learner.model, cut)!r} can't be cached: {why}. {_ADVICE}"
    )


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module) or "the model"
