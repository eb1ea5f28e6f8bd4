"""What one process of several trains of a network: a contiguous run of its blocks.

    stage 0                      stage 1
    images -> conv1 -> conv2 ->| conv3 -> linear1 -> classifier
                               ^ what conv3 reads

A stage begins where its first block does. What lies between two blocks belongs to the stage of the
first of them, and what lies behind the last block to the last stage.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.distributed.links import DTYPES
from locallearn.engine.blocks import CannotCut, Cut, Reached, evaluating, find_cut
from locallearn.engine.learner import LocalLearner
from locallearn.engine.procedures import logits_of
from locallearn.engine.statistics import tracked_norms
from locallearn.errors import UserError

State = dict[str, Any]

_NUM_CHECKED = 4  # images


class Spread:
    """A learner's network, and where it can be cut.

    Arguments:
        learner: built, of a rule whose blocks need nothing of later ones.
        images: a few of the shape that it takes.

    Attributes:
        names: of the blocks, in the order of the forward.

    Raises:
        UserError: a rule that needs more, or parameters that several blocks read.
    """

    def __init__(self, learner: LocalLearner, images: Tensor) -> None:
        if not learner.build(images).is_local:
            raise UserError(
                f"--parallel layers is for rules whose blocks learn as soon as they have run; rule "
                f"{learner.rule.name!r} needs {_needs(learner)}, as bp, dfa "
                f"and pepita do. Use a local rule (lls, lls-mxm, local-losses, drtp, ...), or "
                f"--parallel data."
            )
        assert learner.plan is not None
        if learner.plan.shared:
            raise UserError(
                f"--parallel layers: {', '.join(learner.plan.shared)} is read by several blocks, "
                f"which must then be in one process. Use --parallel data."
            )
        self.learner = learner
        self._images = images.repeat(_NUM_CHECKED, *[1] * (images.ndim - 1))[:_NUM_CHECKED]
        self._units = {unit.name: unit for unit in learner.units}
        self._calls = _calls(learner, self._images)
        self.names = sorted(self._units, key=lambda name: self._start(name))
        self._cuts: dict[str, Cut | UserError] = {}

    def can_begin_at(self, name: str) -> bool:
        """Whether a stage after the first can begin at a block."""
        return isinstance(self._found(name), Cut)

    def cut(self, name: str) -> Cut:
        """Where a block begins. Raises UserError where the network can't be entered there."""
        found = self._found(name)
        if isinstance(found, UserError):
            raise found
        return found

    def _found(self, name: str) -> Cut | UserError:
        if name not in self._cuts:
            try:
                self._cuts[name] = self._find(name)
            except CannotCut as why:
                self._cuts[name] = UserError(
                    f"no stage can begin at block {name!r}: {why}. Give other numbers of blocks "
                    f"(--balance)."
                )
        return self._cuts[name]

    def _start(self, name: str) -> int:
        """The moment when a block first begins."""
        return self._calls[self._units[name].modules[0]][0][0]

    def _find(self, name: str) -> Cut:
        learner, modules = self.learner, self._units[name].modules
        plan, start = learner.plan, self._start(name)
        assert plan is not None
        if any(block.reads_loose for block in plan.blocks if set(block.members) & set(modules)):
            raise CannotCut("it learns with parameters that lie in front of it")
        for module, calls in self._calls.items():
            has_state = any(True for _ in (*module.parameters(False), *module.buffers(False)))
            if has_state and min(calls)[0] < start <= max(calls)[0]:
                kind = type(module).__name__
                raise CannotCut(f"{kind} with numbers of its own runs before it and after it")
        cut = find_cut(learner.model, lambda m: m is modules[0], self._images, learner.infer)
        if cut.feature_dtype not in DTYPES:
            raise CannotCut(f"it reads {cut.feature_dtype}, which is not sent")
        cut.check(self._images, learner.infer)
        return cut

    def stage(self, number: int, sizes: Sequence[int]) -> Stage:
        """A stage of a network of which so many blocks are in each; it holds its own weights alone.

        Raises:
            UserError: no stage can begin there, or it reads weights of another.
        """
        ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
        firsts = [self.names[end] for end in ends[:-1]]
        cuts = [self.cut(name) for name in firsts]
        starts = [self._start(name) for name in firsts]
        last = len(sizes) - 1
        stage = Stage(
            self.learner,
            number,
            cuts[number - 1] if number > 0 else None,
            cuts[number] if number < last else None,
            self._owners(ends, starts),
            self._not_read_in(number, starts),
        )
        features = self._images
        if number > 0:
            features = cuts[number - 1].made(self._images, self.learner.infer)
        before = stage.infer(features)
        stage.let_go()
        if not torch.equal(stage.infer(features), before):
            raise UserError(
                f"the {number + 1}. of {len(sizes)} stages of the network reads weights of another "
                f"one. Give other numbers of blocks (--balance), or use --parallel data."
            )
        return stage

    def _stages_of(self, module: nn.Module, starts: Sequence[int]) -> set[int]:
        """In which stages a module runs, wholly or in part; none of one that is never called."""
        stages: set[int] = set()
        for call in self._calls.get(module, ()):
            first, last = (sum(moment >= start for start in starts) for moment in call)
            stages.update(range(first, last + 1))
        return stages

    def _not_read_in(self, number: int, starts: Sequence[int]) -> list[nn.Parameter]:
        """Parameters that a stage has no use for: of modules that run in others alone."""
        learner = self.learner
        of_others = {
            parameter
            for module in learner.model.modules()
            if (stages := self._stages_of(module, starts)) and number not in stages
            for parameter in module.parameters(recurse=False)
        }
        kept = {
            parameter
            for module in learner.model.modules()
            if number in self._stages_of(module, starts)
            for parameter in module.parameters(recurse=False)
        }
        heads = [
            parameter
            for unit in learner.units
            if unit.head is not None
            and sum(self._start(unit.name) >= start for start in starts) != number
            for parameter in unit.head.parameters()
        ]
        return [*(of_others - kept), *heads]

    def _owners(self, ends: Sequence[int], starts: Sequence[int]) -> _Owners:
        """Whose stage each part of a learner's state is."""
        learner = self.learner
        num = len(ends)
        of_unit = {
            name: next(stage for stage, end in enumerate(ends) if place < end)
            for place, name in enumerate(self.names)
        }
        # A module is the stage's in which its call first began: never called, the first's.
        of_module = {
            name: min(self._stages_of(module, starts), default=0)
            for name, module in learner.model.named_modules(remove_duplicate=False)
        }
        of_tensor = {key: of_module[key.rpartition(".")[0]] for key in learner.model.state_dict()}
        # What a block trains is its stage's, and what the output layer reaches the last one's.
        trained_by = {
            parameter: block
            for block, optimizer in learner.optimizers.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in learner.model.named_parameters(remove_duplicate=False):
            block = trained_by.get(parameter)
            holder = learner.model.get_submodule(name.rpartition(".")[0])
            if block in of_unit:
                of_tensor[name] = of_unit[block]
            elif block is not None and num - 1 in self._stages_of(holder, starts):
                of_tensor[name] = num - 1
        units = [unit for unit in learner.units if unit.head is not None]
        of_head = {
            key: of_unit[units[int(key.partition(".")[0])].name]
            for key in learner.heads.state_dict()
        }
        of_norm = [of_module[name] for name in tracked_norms(learner.model)]
        of_optimizer = {name: of_unit.get(name, num - 1) for name in learner.optimizers}
        return _Owners(of_tensor, of_head, of_optimizer, of_norm)


@dataclass(frozen=True)
class _Owners:
    """Which stage holds each part of a learner's state."""

    of_tensor: dict[str, int]
    of_head: dict[str, int]
    of_optimizer: dict[str, int]
    of_norm: list[int]

    def merged(self, own: State, states: Sequence[State]) -> State:
        """The state of the whole.

        Arguments:
            own: of any stage's learner, with all the entries.
            states: the parts, by stage.
        """
        whole = dict(own)
        for name, owners in self._tables():
            whole[name] = copy.copy(own[name])  # a module's has more to it than entries
            for key, stage in owners.items():
                whole[name][key] = states[stage][name][key]
        counts = self._merged_counts([state["statistics"]["counts"] for state in states])
        whole["statistics"] = {"counts": counts}
        return whole

    def weights(self, learner: LocalLearner, stage: int) -> State:
        """What a stage has to say of its learner's modules."""
        tables = (("model", learner.model, self.of_tensor), ("heads", learner.heads, self.of_head))
        return {
            name: {key: t for key, t in module.state_dict().items() if owners[key] == stage}
            for name, module, owners in tables
        }

    def merged_replica(self, states: Sequence[State]) -> State:
        """The same of :meth:`LocalLearner.replica_state`."""
        running = {
            name: states[self.of_tensor[name]]["running"][name] for name in states[0]["running"]
        }
        return {"running": running, "counts": self._merged_counts([s["counts"] for s in states])}

    def _merged_counts(self, counts: Sequence[Tensor]) -> Tensor:
        columns = [counts[stage][column] for column, stage in enumerate(self.of_norm)]
        return torch.stack(columns) if columns else counts[0]

    def part(self, state: State, stage: int) -> State:
        """What a stage has to say of its learner's state."""
        parts = {
            name: {key: state[name][key] for key, owner in owners.items() if owner == stage}
            for name, owners in self._tables()
        }
        return state | parts

    def _tables(self) -> tuple[tuple[str, dict[str, int]], ...]:
        return (
            ("model", self.of_tensor),
            ("heads", self.of_head),
            ("optimizers", self.of_optimizer),
        )


class Stage:
    """A stage of a learner, which in this process learns alone.

    Arguments:
        learner: the whole.
        number: of the stage, from 0.
        entry: where it begins; None of the first.
        exit: where the next begins; None of the last.
        owners: see there.
        others: parameters that it has no use for.
    """

    def __init__(
        self,
        learner: LocalLearner,
        number: int,
        entry: Cut | None,
        exit: Cut | None,
        owners: _Owners,
        others: Sequence[nn.Parameter] = (),
    ) -> None:
        self.learner = learner
        self.number = number
        self.owners = owners
        self._entry = entry
        self._exit = exit
        self._others = others
        self._strides: dict[nn.Parameter, tuple[int, ...]] = {}  # of what was let go

    @property
    def is_first(self) -> bool:
        return self._entry is None

    @property
    def is_last(self) -> bool:
        return self._exit is None

    @contextlib.contextmanager
    def alone(self, put: Callable[[Tensor], None]) -> Iterator[None]:
        """Within: the model takes what the stage reads, in place of images, and runs the stage.

        Arguments:
            put: is given what the next stage reads; the model then yields None.
        """
        learner, model = self.learner, self.learner.model
        before, were_images = model._compiled_call_impl, learner.takes_images
        call = before or model._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Reached as reached:
                put(reached.tensor)
                return None

        with contextlib.ExitStack() as stack:
            if self._entry is not None:
                stack.enter_context(self._entry.entered())
            if self._exit is not None:
                stack.enter_context(self._exit.stopping())
            model._compiled_call_impl = run
            learner.takes_images = self.is_first
            try:
                yield
            finally:
                model._compiled_call_impl, learner.takes_images = before, were_images

    def infer(self, features: Tensor) -> Tensor:
        """What the next stage reads, or the logits, in evaluation mode."""
        put: list[Tensor] = []
        with evaluating(self.learner.model), self.alone(put.append):
            made = self.learner.run(features)
        return put[0] if put else logits_of(made)

    def let_go(self) -> None:
        """Hold no weight, and no optimizer's state, of what other stages train: their parameters
        keep their shapes, and lie on one value."""
        for name, optimizer in self.learner.optimizers.items():
            if self.owners.of_optimizer[name] != self.number:
                optimizer.state.clear()
        assert not self._strides, "it has let go already"
        for parameter in self._others:
            self._strides[parameter] = parameter.stride()
            parameter.data = parameter.new_zeros(()).expand(parameter.shape)

    def hold_all(self) -> None:
        """Have room for the weights of the whole network again; what is in it says nothing."""
        for parameter, stride in self._strides.items():
            parameter.data = torch.empty_strided(
                parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
            )
        self._strides.clear()


def whole(learner: LocalLearner) -> Stage:
    """The only stage of a network that is not cut, whatever its rule."""
    optimizers, norms = learner.optimizers, tracked_norms(learner.model)
    owners = _Owners(
        of_tensor=dict.fromkeys(learner.model.state_dict(), 0),
        of_head=dict.fromkeys(learner.heads.state_dict(), 0),
        of_optimizer=dict.fromkeys(optimizers, 0),
        of_norm=[0] * len(norms),
    )
    return Stage(learner, 0, None, None, owners)


def _calls(learner: LocalLearner, images: Tensor) -> dict[nn.Module, list[tuple[int, int]]]:
    """Module -> first and last moment of each of its calls; at every moment another call begins."""
    calls: dict[nn.Module, list[tuple[int, int]]] = {}
    going_on: list[int] = []
    moment = -1

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal moment
        moment += 1
        going_on.append(moment)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(module, []).append((going_on.pop(), moment))

    handles: list[Any] = []
    for module in learner.model.modules():
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
    try:
        with evaluating(learner.model):
            learner.infer(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _needs(learner: LocalLearner) -> str:
    return {
        "global error": "the error at the network's output",
        "two forwards": "a second forward of the whole network",
        "end to end": "gradients through every later block",
    }.get(str(learner.rule.requires), str(learner.rule.requires))
