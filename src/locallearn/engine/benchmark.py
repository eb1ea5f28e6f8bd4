"""Step time and memory of local rules beside a tuned backpropagation, measured side by side.

First a gate: on the very shapes that are measured, every backend's gradients must be those of the
reference. Then the sides in turn (A B C A B C ...), so that a machine that slows down slows all of
them, and ratios are taken round by round.

Every side has the same network, batch, optimizer, precision and memory format. Backpropagation is
tuned as hard as what it stands beside: channels-last, its update through the same kernel (through
each one's, of several backends), eager and compiled, on CUDA also captured in a graph; the fastest
of these is what ratios refer to.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.engine.graphs import NUM_WARM_UP_STEPS, GraphedStep
from locallearn.engine.learner import LocalLearner
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.engine.timing import elapsed_ms, order_of_round
from locallearn.errors import UserError
from locallearn.kernels import choose_backend
from locallearn.models import is_foreign
from locallearn.models.sources import check_logits
from locallearn.rules import Requirement, parse_rule

Step = Callable[[Tensor, Tensor], object]

# How far a backend's gradient may lie from the exact one, as a share of its norm, beyond twice what
# autograd in the same precision is off: in a typical channel, and at all. An activation within a
# rounding of zero can take either slope, which moves the gradients of its own channel: of SmallConv
# at batch 128 (fp32) a block's by 5e-4, now with one backend and now with another.
_GATE_FLOOR = {"fp32": 1e-4, "bf16": 5e-3}
_GATE_FLOOR_AT_ALL = {"fp32": 5e-3, "bf16": 2e-2}
_TYPICAL = 0.75  # of the channels
# Of a block's largest gradient: what float64 leaves of one that is zero is less by far.
_ZERO_SHARE = 1e-10
# Weights after some steps of Adam, captured against ordinary.
_NUM_GRAPH_STEPS = 4
# Of backpropagation, measured for their memory.
_SAVING_FORMS = ("checkpoint", "accumulate:4", "fused-optimizer")
_GRAPH_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured. Meanings and units are those of the command line's help; ``backends`` are
    of the closed form, beside each other."""

    model: str
    rules: tuple[str, ...]
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    precision: str
    device: str
    backends: tuple[str, ...]
    num_rounds: int
    seed: int = 0


@dataclass
class Side:
    """One of the things compared.

    Arguments:
        rule: by name.
        path: "closed form", "generic", or how a backpropagation is run.
        backend: of the kernels, or "eager" or "compiled" of a backpropagation.
        step: takes images and labels.
        is_tuned_bp: whether it may be what ratios refer to.
        graphed: of a captured step its learner, and one that takes the same steps as they are.
        update: of a backpropagation the backend of its update, where several are compared.
    """

    rule: str
    path: str
    backend: str
    step: Step
    is_tuned_bp: bool = False
    graphed: tuple[LocalLearner, LocalLearner] | None = None
    update: str | None = None
    times_ms: list[float] = field(default_factory=list)
    peak_activation_mib: float = 0.0

    @property
    def name(self) -> str:
        """In a message or among the gate's errors."""
        words = f"{self.rule}: {self.path}, {self.backend}"
        return words if self.update is None else f"{words}, {self.update} update"


@dataclass(frozen=True)
class Spread:
    """median, p20 and p80."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        cut = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), cut[1], cut[7])


@dataclass(frozen=True)
class GateResult:
    """Whether the backends agree with the reference, and by how much they do not.

    errors: "rule: backend" -> the largest error of any parameter's gradient, a share of its norm.
    """

    is_green: bool
    errors: dict[str, float]


@dataclass(frozen=True)
class BenchmarkResult:
    """gate, and a row for each side; no rows where the gate is red."""

    gate: GateResult
    rows: list[dict[str, Any]]


def run_benchmark(
    config: BenchmarkConfig,
    build: Callable[[], nn.Module],
    on_progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkResult:
    """Gate, then measure.

    Arguments:
        config: what.
        build: makes the network, each time with the same weights.
        on_progress: told what is going on, a phrase at a time.

    Raises:
        UserError: a rule that has no local update, a backend that can't run, or a model from
            elsewhere that does not fit the images or the classes.
    """
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(config.batch_size, *config.image_shape, generator=generator)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(config.num_classes, (config.batch_size,), generator=generator)
    labels = labels.to(device)
    for rule in config.rules:
        if parse_rule(rule).requires is Requirement.END_TO_END:
            raise UserError(f"rule {rule!r} is no rule to compare: bp is always measured beside.")

    if is_foreign(config.model):
        check_logits(config.model, build().to(device), images[:2], config.num_classes)
    backends = [choose_backend(name, config.device) for name in config.backends]
    gate = _check(config, build, backends, images, labels, on_progress)
    if not gate.is_green:
        return BenchmarkResult(gate, [])

    sides = _sides(config, build, backends, images, labels)
    for side in sides:
        on_progress(f"first steps of {side.name}")
        # A graph allocates what it needs when it is captured, and nothing when it is replayed.
        for _ in range(NUM_WARM_UP_STEPS):
            side.step(images, labels)
            if side.graphed is not None:
                side.graphed[1].step(images, labels)
        peak = peak_memory_bytes(functools.partial(side.step, images, labels), device)
        side.peak_activation_mib = peak / 2**20
        if side.graphed is not None:
            side.graphed[1].step(images, labels)
    graph_errors = _check_graphs(sides, images, labels)
    gate.errors.update(graph_errors)
    if any(error > _GRAPH_TOLERANCE[config.precision] for error in graph_errors.values()):
        return BenchmarkResult(GateResult(False, gate.errors), [])
    for number in range(config.num_rounds):
        on_progress(f"round {number + 1} of {config.num_rounds}")
        for side in order_of_round(sides, number):
            step = functools.partial(side.step, images, labels)
            side.times_ms.append(elapsed_ms(step, device))
    return BenchmarkResult(gate, _rows(sides, config.batch_size, backends[0]))


def _rows(sides: list[Side], batch_size: int, first_backend: str) -> list[dict[str, Any]]:
    tuned = min(
        (side for side in sides if side.is_tuned_bp),
        key=lambda side: statistics.median(side.times_ms),
    )
    firsts = {
        (side.rule, side.path): side.times_ms
        for side in sides
        if side.path.startswith("closed form") and side.backend == first_backend
    }
    rows = []
    for side in sides:
        times = Spread.of(side.times_ms)
        row: dict[str, Any] = {
            "rule": side.rule,
            "path": side.path,
            "backend": side.backend,
            "is_tuned_bp": side is tuned,
            "images_per_second": 1000 * batch_size / times.median,
            "peak_activation_mib": side.peak_activation_mib,
            "activation_vs_tuned_bp": side.peak_activation_mib / tuned.peak_activation_mib,
        }
        if side.update is not None:
            row["update"] = side.update
        row |= {f"step_time_ms_{name}": value for name, value in asdict(times).items()}
        row |= _speedups("tuned_bp", tuned.times_ms, side.times_ms)
        first = firsts.get((side.rule, side.path))
        if first is not None and side.backend != first_backend:
            row |= _speedups(first_backend, first, side.times_ms)
        rows.append(row)
    return rows


def _speedups(name: str, theirs: list[float], own: list[float]) -> dict[str, float]:
    """How many times faster than another side, round by round."""
    spread = asdict(Spread.of([a / b for a, b in zip(theirs, own, strict=True)]))
    return {f"speedup_vs_{name}_{of}": value for of, value in spread.items()}


# -- the gate -----------------------------------------------------------------------------------


def _check(
    config: BenchmarkConfig,
    build: Callable[[], nn.Module],
    backends: Sequence[str],
    images: Tensor,
    labels: Tensor,
    on_progress: Callable[[str], None],
) -> GateResult:
    """One step of plain SGD at rate one: what each parameter moved by is its gradient.

    Exact is autograd in float64, which shares nothing with what is checked. A block's gradients may
    be off by twice what autograd in the benchmark's own precision is.
    """

    def gradients(rule: str, backend: str, precision: str, is_exact: bool) -> dict[str, Tensor]:
        on_progress(f"gate: {rule}, {'exact' if is_exact else backend}")
        sgd: dict[str, Any] = {"optimizer": _sgd, "recalibration_batches": 0}
        torch.manual_seed(config.seed)
        network = build().to(images.device)
        built = parse_rule(rule)
        learner = LocalLearner(
            network,
            built,
            num_classes=config.num_classes,
            blocks="auto",
            example_input=images[:2],
            backend=backend,
            precision=precision,
            **sgd,
        )
        x = images
        if is_exact:
            single, x = learner, images.double()
            learner = LocalLearner(
                copy.deepcopy(network).double(),
                built,
                num_classes=config.num_classes,
                blocks="auto",
                example_input=x[:2],
                backend=backend,
                **sgd,
            )
            learner.heads.load_state_dict(single.heads.state_dict())
            for head, twin in zip(learner.heads, single.heads, strict=True):
                for buffer, source in zip(head.buffers(), twin.buffers(), strict=True):
                    buffer.copy_(source)
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        learner.step(x, labels)
        return {n: (before[n] - p.detach()).double() for n, p in learner.named_parameters()}

    errors: dict[str, float] = {}
    is_green = True
    for rule in config.rules:
        exact = gradients(rule, "autograd", "fp32", True)
        plain = _errors(gradients(rule, "autograd", config.precision, False), exact)
        errors[f"{rule}: autograd"] = max(error.at_all for error in plain.values())
        for checked in dict.fromkeys(("reference", *backends)):
            ours = _errors(gradients(rule, checked, config.precision, False), exact)
            errors[f"{rule}: {checked}"] = max(error.at_all for error in ours.values())
            for block, error in ours.items():
                typical = 2 * plain[block].typical + _GATE_FLOOR[config.precision]
                at_all = 2 * plain[block].at_all + _GATE_FLOOR_AT_ALL[config.precision]
                is_green &= error.typical <= typical and error.at_all <= at_all
    return GateResult(is_green, errors)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


class _Error(NamedTuple):
    """Of a block's gradients, each a share of its norm: of the channels up to _TYPICAL, and of the
    whole."""

    typical: float
    at_all: float


def _block_of(parameter: str) -> str:
    """ "model.conv1.conv.weight" as "model.conv1", and "heads.0.modulation" as "heads.0"."""
    return ".".join(parameter.split(".")[:2])


def _errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, _Error]:
    """Block -> the largest errors of any of its parameters' gradients.

    A gradient that is exactly zero, as a bias's under BatchNorm, is rounding alone: it is measured
    by the largest of its block.
    """
    errors: dict[str, _Error] = {}
    largest: dict[str, Tensor] = {}
    for name, gradient in exact.items():
        block = _block_of(name)
        norm = gradient.norm().clamp_min(1e-12)
        largest[block] = torch.maximum(norm, largest.get(block, norm))
    for name, gradient in exact.items():
        block = _block_of(name)
        norm = gradient.norm().clamp_min(1e-12)
        if norm < _ZERO_SHARE * largest[block]:
            norm = largest[block]
        off = (actual[name] - gradient).flatten(1) if gradient.ndim > 1 else actual[name] - gradient
        channels = off.norm(dim=1) if off.ndim > 1 else off.abs()
        # As if every channel were off by this much.
        typical = channels.quantile(_TYPICAL) * len(channels) ** 0.5 / norm
        known = errors.get(block, _Error(0.0, 0.0))
        at_all = (off.norm() / norm).item()
        errors[block] = _Error(max(known.typical, typical.item()), max(known.at_all, at_all))
    return errors


def _check_graphs(sides: list[Side], images: Tensor, labels: Tensor) -> dict[str, float]:
    """Side -> how far a captured step's weights lie from those of ordinary ones, after a few."""
    errors = {}
    for side in sides:
        if side.graphed is None:
            continue
        graphed, twin = side.graphed
        for _ in range(_NUM_GRAPH_STEPS):
            side.step(images, labels)
            twin.step(images, labels)
        shares = [
            ((p - q).norm() / q.norm().clamp_min(1e-12)).item()
            for p, q in zip(graphed.parameters(), twin.parameters(), strict=True)
        ]
        errors[side.name] = max(shares)
    return errors


# -- the sides ----------------------------------------------------------------------------------


def _sides(
    config: BenchmarkConfig,
    build: Callable[[], nn.Module],
    backends: Sequence[str],
    images: Tensor,
    labels: Tensor,
) -> list[Side]:
    def learner(rule: str, backend: str, **settings: Any) -> LocalLearner:
        torch.manual_seed(config.seed)
        return LocalLearner(
            build().to(images.device),
            parse_rule(rule),
            num_classes=config.num_classes,
            blocks="auto",
            example_input=images[:2],
            optimizer="schedulefree-adamw",  # for all: pepita's usual one is another
            backend=backend,
            precision=config.precision,
            recalibration_batches=0,
            **settings,
        )

    sides = []
    # Not every rule's blocks have a closed form: what has none is there once.
    closed = []
    for rule in config.rules:
        fast = {backend: learner(rule, backend) for backend in backends}
        if "closed form" in fast[backends[0]].block_paths.values():
            closed.append(rule)
            sides += [Side(rule, "closed form", name, each.step) for name, each in fast.items()]
        sides.append(Side(rule, "generic", "autograd", learner(rule, "autograd").step))
    updates = {backend: backend if len(backends) > 1 else None for backend in backends}
    for backend, update in updates.items():
        for how, compiled in (("eager", False), ("compiled", True)):
            step = learner("bp", backend, compile=compiled).step
            sides.append(Side("bp", "backprop", how, step, True, update=update))
    if config.device == "cuda":
        for rule, backend, overlap in itertools.product(closed, backends, (False, True)):
            path = "closed form, graph" + (", overlapped" if overlap else "")
            captured = learner(rule, backend, overlap_updates=overlap)
            pair = (captured, learner(rule, backend))
            sides.append(Side(rule, path, backend, GraphedStep(captured), graphed=pair))
        for backend, update in updates.items():
            for how, compiled in (("eager", False), ("compiled", True)):
                captured = learner("bp", backend, compile=compiled)
                pair = (captured, learner("bp", backend, compile=compiled))
                graphed = GraphedStep(captured)
                sides.append(
                    Side("bp", "backprop, graph", how, graphed, True, graphed=pair, update=update)
                )
    for form in _SAVING_FORMS:
        saving = learner(f"bp:bp_memory={form}", backends[0])
        sides.append(Side("bp", form, "eager", saving.step))
    return sides


def same_weights(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder whose networks are all copies of one."""
    original = build()
    return lambda: copy.deepcopy(original)
