"""What each block of a network costs in time, measured on the device it will train on.

For spreading a training over processes, which goes by the slowest. Costs are those of whole steps,
cut where one block ends and the next begins: their sum is the step's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from locallearn.engine.blocks import Blocks, Inputs, plan_blocks
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.rules import Backprop

REPEATS = 9
NUM_WARM_UP_STEPS = 2
_FEWEST_REPEATS = 3


@dataclass(frozen=True)
class BlockCost:
    """Of a block under a local rule, or (named "") of the output layer behind the last of them.

    Glue in front of a block, as a skip's addition, counts to the block before it; in front of the
    first, to the first.

    Attributes:
        name: of the block in the model; of a group that learns together, of its last.
        step_ms: of a training step: forward, head, backward and update.
        forward_ms: of an inference's forward on the same batch.
        input_bytes: of the tensors that it reads: what comes in if a stage begins here.
        num_param_bytes: of what it trains, its head's included: gradients to be reduced.
    """

    name: str
    step_ms: float
    forward_ms: float
    input_bytes: int
    num_param_bytes: int


@dataclass(frozen=True)
class BackpropCost:
    """Of a block under backpropagation of the whole network; see :class:`BlockCost`.

    Attributes:
        name: of the block in the model; "" of the output layer.
        forward_ms: in training.
        backward_ms: until the gradient of what it reads is there.
        update_ms: its share, by parameters, of the optimizer's.
        input_bytes: of the tensors that it reads; their gradient is as large.
        num_param_bytes: of its trained parameters.
    """

    name: str
    forward_ms: float
    backward_ms: float
    update_ms: float
    input_bytes: int
    num_param_bytes: int

    @property
    def step_ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.update_ms


Cost = TypeVar("Cost", BlockCost, BackpropCost)


def measure_block_costs(
    learner: LocalLearner,
    images: Inputs,
    labels: Tensor,
    *,
    repeats: int = REPEATS,
    limit_seconds: float = 5.0,
    warm_up: int = NUM_WARM_UP_STEPS,
) -> list[BlockCost]:
    """The median cost of each block in steps on one batch, in the order in which they run; that of
    the output layer comes last.

    The learner takes these steps and is then put back to where it was: weights, statistics,
    optimizers, and torch's random numbers.

    Arguments:
        learner: of a local rule.
        images, labels: a batch, as ``learner.step`` takes it.
        repeats: timed steps, after some that are not.
        limit_seconds: fewer are timed, but three, where they would take longer than this.
        warm_up: how many come before them.

    Raises:
        UserError: a rule whose blocks do not learn on their own, or a model that runs a block more
            than once, or not at all.
    """
    learner.build(images)
    if not learner.is_local:
        raise UserError(
            f"rule {learner.rule.name!r} needs {learner.rule.requires}, so its blocks have no "
            f"steps of their own to be measured. Use a local rule, as lls."
        )
    modules = learner.block_modules
    trained = {
        name: _num_bytes([p for group in optimizer.param_groups for p in group["params"]])
        for name, optimizer in learner.optimizers.items()
    }
    marks = _Marks(labels.device)

    def step() -> None:
        learner.step(images, labels)

    def infer() -> None:
        learner.infer(images)

    with learner.trial(), _marking_blocks(modules, marks) as input_bytes:
        steps = _median_spans(_timed(step, marks, repeats, limit_seconds, warm_up), modules)
        learner.eval()
        forwards = _median_spans(_timed(infer, marks, repeats, limit_seconds, warm_up), modules)
    return [
        BlockCost(name, steps[name], forwards[name], input_bytes[name], trained.get(name, 0))
        for name in steps
    ]


def measure_backprop_costs(
    learner: LocalLearner,
    images: Inputs,
    labels: Tensor,
    *,
    blocks: Blocks = "auto",
    repeats: int = REPEATS,
    limit_seconds: float = 5.0,
    warm_up: int = NUM_WARM_UP_STEPS,
) -> list[BackpropCost]:
    """As :func:`measure_block_costs`, of a learner under plain bp.

    Arguments:
        learner: of rule bp, in its plain form (``bp_memory`` plain), not compiled.
        images, labels: a batch, as ``learner.step`` takes it.
        blocks: of which modules, as :class:`LocalLearner` takes them.
        repeats, limit_seconds, warm_up: as of :func:`measure_block_costs`.

    Raises:
        UserError: another rule, or a model that runs a block more than once, or not at all, or in
            which no gradient comes back to one of them.
    """
    learner.build(images)
    if not isinstance(learner.rule, Backprop) or learner.rule.bp_memory != "plain":
        raise UserError(
            f"the costs of backpropagation are measured under rule 'bp' in its plain form, not "
            f"{learner.rule.name!r}."
        )
    plan = plan_blocks(learner.model, blocks, inputs=images, num_classes=learner.num_classes)
    modules = {block.name: block.members for block in plan.blocks}
    marks = _Marks(labels.device)

    def step() -> None:
        learner.step(images, labels)

    with (
        learner.trial(),
        _marking_blocks(modules, marks, learner.model) as input_bytes,
        _marking_update(learner.optimizers[""], marks),
    ):
        runs = _timed(step, marks, repeats, limit_seconds, warm_up)
    return _backprop_costs(learner, modules, runs, input_bytes)


def halved(batch_size: int, least: int = 2) -> list[int]:
    """A batch size, and what halving it makes of it, down to so many images: of one BatchNorm may
    have no variance."""
    sizes = [batch_size]
    while sizes[-1] // 2 >= max(2, least):
        sizes.append(sizes[-1] // 2)
    return sizes


def median_of(rounds: Sequence[Sequence[Cost]]) -> list[Cost]:
    """Of costs that were measured several times, each time's medians: their medians."""
    found = []
    for costs in zip(*rounds, strict=True):
        times = {
            field.name: statistics.median(getattr(cost, field.name) for cost in costs)
            for field in dataclasses.fields(costs[0])
            if field.name.endswith("_ms")
        }
        found.append(dataclasses.replace(costs[0], **times))
    return found


def _backprop_costs(
    learner: LocalLearner,
    modules: dict[str, tuple[nn.Module, ...]],
    runs: list[dict[str, float]],
    input_bytes: dict[str, int],
) -> list[BackpropCost]:
    names = _in_order(runs[0], modules)
    for name in names[1:]:
        if _back(name) not in runs[0]:
            what = f"the input of block {name!r}" if name else "what the last block hands on"
            raise UserError(
                f"no gradient comes back to {what}, so the backward can't be cut there; name "
                f"other blocks."
            )
    trained = {
        name: _num_bytes(p for module in members for p in module.parameters() if p.requires_grad)
        for name, members in modules.items()
    }
    total = _num_bytes(p for p in learner.model.parameters() if p.requires_grad)
    trained[""] = total - sum(trained.values())
    costs = []
    for place, name in enumerate(names):
        following = names[place + 1] if place + 1 < len(names) else None
        begun = _START if place == 0 else name
        done = _LOSS if following is None else following
        # Backward the same way round: from the gradient of what it hands on to that of its input.
        given = _LOSS if following is None else _back(following)
        passed = _UPDATE if place == 0 else _back(name)
        costs.append(
            BackpropCost(
                name,
                statistics.median(run[done] - run[begun] for run in runs),
                statistics.median(run[passed] - run[given] for run in runs),
                statistics.median(run[_END] - run[_UPDATE] for run in runs) * trained[name] / total,
                input_bytes[name],
                trained[name],
            )
        )
    return costs


# -- taking the time ------------------------------------------------------------------------------

# Moments of a step besides those at which its blocks begin, which go by the blocks' names, and at
# which the last one ends, "". No module is named so.
_START, _LOSS, _UPDATE, _END = "<start>", "<loss>", "<update>", "<end>"


def _back(name: str) -> str:
    """When the gradient of what a block reads is there."""
    return f"<back>{name}"


class _Marks:
    """Moments of the step that is being timed.

    On CUDA they are events on the stream, so that the host runs ahead as it does in training, and
    a block that waits for its launches is charged for that.

    Arguments:
        device: whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._times

    def begin(self) -> None:
        self._times = {}
        self._wait()
        self.mark(_START)

    def mark(self, name: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._times[name] = event
            return
        self._wait()
        self._times[name] = time.perf_counter()

    def end(self) -> dict[str, float]:
        """Name -> ms since the beginning."""
        self.mark(_END)
        self._wait()
        first = self._times[_START]
        if self._device.type == "cuda":
            return {name: first.elapsed_time(event) for name, event in self._times.items()}
        return {name: 1000 * (moment - first) for name, moment in self._times.items()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


@contextlib.contextmanager
def _marking_blocks(
    modules: Mapping[str, Sequence[nn.Module]], marks: _Marks, model: nn.Module | None = None
) -> Iterator[dict[str, int]]:
    """Within: blocks mark when they begin; each when it ends, under "", which stays the last's.

    Arguments:
        modules: block name -> its modules, in the order in which they run.
        marks: receives the moments.
        model: whose logits and gradients mark theirs too; None where there are none.

    Yields:
        Block name -> bytes of what it read, last of all "" -> of what the last one handed on.
    """
    num_bytes: dict[str, int] = {}
    latest = ""  # of the blocks that have run

    def mark_gradients(name: str, tensors: Sequence[Tensor]) -> None:
        behind = latest

        def mark(grad: Tensor) -> None:
            if name or behind == latest:
                marks.mark(_back(name))

        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(mark)  # type: ignore[no-untyped-call]

    def begins(name: str) -> Callable[..., None]:
        def mark(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal latest
            if name in marks:
                raise UserError(
                    f"block {name!r} runs more than once in a forward, so it has no one cost."
                )
            marks.mark(name)
            latest = name
            tensors = _tensors((args, kwargs))
            num_bytes[name] = _num_bytes(tensors)
            if model is not None:
                mark_gradients(name, tensors)

        return mark

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        marks.mark("")
        num_bytes[""] = _num_bytes(_tensors(output))
        if model is not None:
            mark_gradients("", _tensors(output))

    def has_logits(module: nn.Module, args: Any, output: Any) -> None:
        marks.mark(_LOSS)

    with contextlib.ExitStack() as handles:
        for name, (first, *_, last) in ((n, (*m[:1], *m)) for n, m in modules.items()):
            handles.callback(first.register_forward_pre_hook(begins(name), with_kwargs=True).remove)
            handles.callback(last.register_forward_hook(ends).remove)
        if model is not None:
            handles.callback(model.register_forward_hook(has_logits).remove)
        yield num_bytes


@contextlib.contextmanager
def _marking_update(optimizer: Optimizer, marks: _Marks) -> Iterator[None]:
    """Within: marks when its step begins."""

    def begins(*args: Any) -> None:
        marks.mark(_UPDATE)

    handle = optimizer.register_step_pre_hook(begins)
    try:
        yield
    finally:
        handle.remove()


def _timed(
    call: Callable[[], object], marks: _Marks, repeats: int, limit_seconds: float, warm_up: int
) -> list[dict[str, float]]:
    """The moments of each timed call."""
    for _ in range(warm_up):
        marks.begin()
        call()
    runs: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(runs) < repeats:
        marks.begin()
        call()
        runs.append(marks.end())
        is_late = time.perf_counter() - began > limit_seconds
        if is_late and len(runs) >= _FEWEST_REPEATS:
            break
    return runs


def _in_order(run: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """The blocks as they ran, and "" behind them."""
    missing = [name for name in names if name not in run]
    if missing:
        raise UserError(
            f"block {missing[0]!r} does not run in the model's forward, so it has no cost."
        )
    return [*sorted(names, key=lambda name: run[name]), ""]


def _median_spans(runs: Sequence[Mapping[str, float]], names: Collection[str]) -> dict[str, float]:
    """Block name -> ms from where it begins to where the next one does."""
    ordered = _in_order(runs[0], names)
    begun = [_START, *ordered[1:]]
    return {
        name: statistics.median(run[done] - run[start] for run in runs)
        for name, start, done in zip(ordered, begun, [*begun[1:], _END], strict=True)
    }


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
