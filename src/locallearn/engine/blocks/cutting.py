"""A model entered at one of its modules: what runs before it is passed over.

    the model's forward      conv1 -> bn1 -> layer1 -> layer2 -> layer3 -> layer4 -> fc
    cut at layer3            [     stand-ins: empty outputs    ]  ^
                                                    what it reads goes in here

The forward itself runs as it is written: of the modules in front, each yields an output of the
right shape without content, and costs nothing; what the forward does between them it does on these;
and the module at the cut is given what it would have read, whatever reaches it. So any model will
do whose part behind reads nothing in front but that one tensor. Whether this is so is for the
caller to check on real images: see :meth:`Cut.check`.

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

# Two sizes of a batch, from which the shapes for any other follow.
_BATCHES = (2, 3)

Run = Callable[[Tensor], Any]
"""Runs a model on images, under whatever autocast it computes in."""


class CannotCut(Exception):  # noqa: N818 - the caller says what it means to the user
    """Why a model can't be entered there."""


class Reached(Exception):  # noqa: N818 - no error
    """The forward has come to a cut that it is not to pass.

    Arguments:
        tensor: what the module there would have read.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


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
        module: at the cut.
        place: which leaf of its arguments is a tensor.
        feature: that tensor.
        over: calls that were over when it began and lay in no other such: module, output.
        started: all modules whose calls had begun by then.
    """

    module: nn.Module
    place: int
    feature: Tensor
    over: list[tuple[nn.Module, Any]]
    started: set[nn.Module]


class Cut:
    """A place in a model's forward, made by :func:`find_cut`.

    Attributes:
        module: that begins there.
        feature_shape: of what it reads, of an image.
        feature_dtype: of that, in evaluation mode.
        started: modules whose calls have begun before it.
        num_passed: modules that are passed over.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: _Trace,
        outputs: dict[nn.Module, list[Any]],
        image_shape: torch.Size,
    ) -> None:
        self.module = trace.module
        self.feature_shape = tuple(trace.feature.shape[1:])
        self.feature_dtype = trace.feature.dtype
        self.started = trace.started
        self.num_passed = len(outputs)
        self._model = model
        self._place = trace.place
        self._outputs = outputs
        self._image_shape = image_shape
        self._feature: Tensor | None = None
        self._is_behind = False
        self._num_calls: dict[nn.Module, int] = {}

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Within: the forward ends here, by raising :class:`Reached`."""

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise Reached(tree_leaves((args, kwargs))[self._place])

        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within: the model takes what its module here reads, (N, *feature_shape), for images."""
        handles = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_forward_pre_hook(self._hand_over, with_kwargs=True),
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

    def made(self, images: Tensor, run: Run) -> Tensor:
        """What the module here reads for images, (N, *feature_shape), in evaluation mode."""
        with evaluating(self._model), self.stopping():
            try:
                run(images)
            except Reached as reached:
                return reached.tensor
        raise AssertionError("the forward did not come to the cut")

    def check(self, images: Tensor, run: Run, *, tolerance: float = 0.0) -> None:
        """Whether the model, entered here, yields the same.

        Arguments:
            images: a few.
            run: from images to one tensor.
            tolerance: of the largest value.

        Raises:
            CannotCut: it does not.
        """
        with evaluating(self._model):
            expected = run(images)
        features = self.made(images, run)
        try:
            with evaluating(self._model), self.entered():
                found = run(features)
        except Exception as error:  # whatever a forward does with tensors without content
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CannotCut(f"what lies in front can't be passed over: {what}") from error
        scale = float(expected.abs().max())
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else 1e9
        if not difference <= tolerance * max(scale, 1e-3):
            raise CannotCut(
                f"what follows reads more than its input: without what lies in front the logits "
                f"differ by {difference:.2g}"
            )

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        (feature,) = tree_leaves((args, kwargs))
        self._feature, self._is_behind = feature, False
        self._num_calls.clear()
        one = torch.zeros((), device=feature.device)
        return (one.expand(len(feature), *self._image_shape),), {}

    def _hand_over(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._is_behind:
            return args, kwargs
        leaves, structure = tree_flatten((args, kwargs))
        leaves[self._place] = self._feature
        self._feature, self._is_behind = None, True
        args, kwargs = tree_unflatten(leaves, structure)
        return args, kwargs

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        call = module._compiled_call_impl or module._call_impl
        outputs = self._outputs[module]

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self._is_behind:
                return call(*args, **kwargs)
            assert self._feature is not None
            number = self._num_calls.get(module, 0)
            self._num_calls[module] = number + 1
            num, device = len(self._feature), self._feature.device
            return tree_map_only(_Like, lambda like: like.empty(num, device), outputs[number])

        return stand_in


def find_cut(
    model: nn.Module, is_there: Callable[[nn.Module], bool], images: Tensor, run: Run
) -> Cut:
    """Where the forward first comes to such a module.

    Arguments:
        model: stays as it is.
        is_there: says of a module whether it is one.
        images: three at least.
        run: runs the model on some of them.

    Raises:
        CannotCut: it reads more than one tensor, or one without a batch, or the forward in front
            does other things for other batches.
        LookupError: the forward comes to no such module.
    """
    small, large = (_trace(model, is_there, images[:num], run) for num in _BATCHES)
    other = "its forward does other things for other batches"
    if small.module is not large.module or len(small.over) != len(large.over):
        raise CannotCut(other)
    shapes = zip(small.feature.shape, large.feature.shape, strict=True)
    sizes = [_sizes(*pair) for pair in shapes]
    is_batch = [size is not None and size.per_image is not None for size in sizes]
    is_plain = bool(small.feature.ndim) and small.feature.shape[0] == _BATCHES[0]
    if not is_plain or is_batch != [True, *[False] * (len(sizes) - 1)]:
        raise CannotCut(
            "what it reads does not have the batch, image by image, in its first dimension alone"
        )
    outputs: dict[nn.Module, list[Any]] = {}
    for (module, one), (also, two) in zip(small.over, large.over, strict=True):
        if module is not also:
            raise CannotCut(other)
        outputs.setdefault(module, []).append(_like(one, two))
    return Cut(model, small, outputs, images.shape[1:])


@torch.no_grad()
def _trace(
    model: nn.Module, is_there: Callable[[nn.Module], bool], images: Tensor, run: Run
) -> _Trace:
    root = _Frame(nn.Identity())
    stack = [root]
    started: set[nn.Module] = set()
    found: list[_Trace] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not found:
            if is_there(module):
                found.append(_cut_at(module, (args, kwargs), stack, started))
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
            run(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise LookupError("the forward comes to no such module")
    return found[0]


def _cut_at(
    module: nn.Module, arguments: Any, stack: list[_Frame], started: set[nn.Module]
) -> _Trace:
    leaves = tree_leaves(arguments)
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        raise CannotCut(f"it reads {len(tensors)} tensors, and one is expected")
    over = [call for frame in stack for call in frame.over]
    return _Trace(module, tensors[0], leaves[tensors[0]], over, set(started))


def _sizes(a: int, b: int) -> _Size | None:
    """A dimension from those of two batches; None where it does not grow with them."""
    if a == b:
        return _Size(None, a)
    first, second = _BATCHES
    per_image = Fraction(a, first)
    return _Size(per_image, 0) if per_image * second == b else None


def _like(one: Any, two: Any) -> Any:
    """An output as it is for any batch: tensors as `_Like`, all else as it was."""

    def join(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        sizes = [_sizes(*pair) for pair in zip(a.shape, b.shape, strict=True)]
        known = tuple(size for size in sizes if size is not None)
        if len(known) != len(sizes):
            raise CannotCut("a shape in front does not grow with the batch")
        return _Like(known, a.dtype)

    return tree_map(join, one, two)
