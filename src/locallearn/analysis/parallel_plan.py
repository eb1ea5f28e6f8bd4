"""What spreading a training over devices is worth: a model of time over measured costs of blocks.

Four ways are put side by side: stages of blocks (layers), copies of the network (data), both, and
GPipe's pipeline under backpropagation. Nothing here is run: costs go in, times come out.

Sources: ring all-reduce, Patarasuk and Yuan 2009; GPipe, Huang et al., NeurIPS 2019
(arXiv 1811.06965).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from locallearn.engine.block_costs import BackpropCost, BlockCost, Cost

Balance = Callable[[Sequence[float], int], tuple[int, ...]]
"""From the blocks' times and a number of stages to the number of blocks in each stage."""

_BYTES_PER_GB, _MIB = 1e9, 2**20


@dataclass(frozen=True)
class Link:
    """Between any two devices, in each direction.

    Arguments:
        bandwidth_gb_s: 1e9 bytes a second.
        latency_us: of a message, whatever its size.
        host_ms_per_mib: computing time that sending takes from the device, and receiving as much;
            0 where a network card or a copy engine does it.
    """

    bandwidth_gb_s: float
    latency_us: float
    host_ms_per_mib: float = 0.0

    def transfer_ms(self, num_bytes: float) -> float:
        """Of one message."""
        return self.latency_us / 1e3 + 1e3 * num_bytes / (self.bandwidth_gb_s * _BYTES_PER_GB)

    def ring_ms(self, num_bytes: float, num_replicas: int) -> float:
        """To sum a tensor over replicas: 2 (D - 1) rounds, in each of which every one of them sends
        and receives a D-th of it."""
        rounds = 2 * (num_replicas - 1)
        return rounds * self.transfer_ms(num_bytes / num_replicas) if num_bytes else 0.0

    def host_ms(self, num_bytes: float) -> float:
        """That sending, or receiving, takes from the device."""
        return self.host_ms_per_mib * num_bytes / _MIB


class CostTable(Generic[Cost]):
    """Costs of the blocks at several batch sizes, and between them in a straight line.

    Arguments:
        by_batch: images at a time -> costs, in the order of the forward, that of the output layer
            last.
    """

    def __init__(self, by_batch: Mapping[int, Sequence[Cost]]) -> None:
        assert by_batch
        self._by_batch: dict[int, list[Cost]] = {
            size: list(by_batch[size]) for size in sorted(by_batch)
        }

    @property
    def smallest(self) -> int:
        """Batch size that was measured."""
        return next(iter(self._by_batch))

    @property
    def largest(self) -> int:
        return next(reversed(self._by_batch))

    def at(self, batch_size: int) -> list[Cost]:
        """For a batch size between the smallest and the largest."""
        assert self.smallest <= batch_size <= self.largest
        if batch_size in self._by_batch:
            return self._by_batch[batch_size]
        below = max(size for size in self._by_batch if size < batch_size)
        above = min(size for size in self._by_batch if size > batch_size)
        share = (batch_size - below) / (above - below)
        pairs = zip(self._by_batch[below], self._by_batch[above], strict=True)
        return [_between(low, high, share) for low, high in pairs]

    def to_json(self) -> dict[str, Any]:
        return {
            str(size): [dataclasses.asdict(cost) for cost in costs]
            for size, costs in self._by_batch.items()
        }


def _between(low: Cost, high: Cost, share: float) -> Cost:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(low):
        a, b = getattr(low, field.name), getattr(high, field.name)
        if isinstance(a, int | float):
            value = a + share * (b - a)
            found[field.name] = round(value) if field.name.endswith("_bytes") else value
    return dataclasses.replace(low, **found)


@dataclass(frozen=True)
class StageLoad:
    """What one stage has to do for a step, on each of its devices.

    Attributes:
        blocks: their names; "" is the output layer.
        compute_ms: of its blocks.
        host_ms: that sending and receiving take from the device.
        exposed_ms: of the reduction of gradients, after the last block: what no computing hides.
        link_ms: that the link to the next stage is busy.
        sent_bytes: to the next stage (GPipe: and to the one before), and to other replicas.
    """

    blocks: tuple[str, ...]
    compute_ms: float
    host_ms: float
    exposed_ms: float
    link_ms: float
    sent_bytes: float

    @property
    def busy_ms(self) -> float:
        return self.compute_ms + self.host_ms + self.exposed_ms


@dataclass(frozen=True)
class Prediction:
    """What a way to spread a training is expected to do.

    Attributes:
        way: as `--parallel` takes it, or "gpipe".
        num_devices: that it uses.
        num_stages, num_replicas: L and D.
        num_micro_batches: of GPipe; None of the others.
        step_ms: from one step to the next, once the pipeline is full.
        fill_ms: once an epoch, until it is.
        speedup: over one device that runs the same rule.
        bound_by: what takes so long: "stage 1", or the link behind it, "link 1".
        stages: in order.
    """

    way: str
    num_devices: int
    num_stages: int
    num_replicas: int
    num_micro_batches: int | None
    step_ms: float
    fill_ms: float
    speedup: float
    bound_by: str
    stages: tuple[StageLoad, ...]

    def images_per_second(self, batch_size: int) -> float:
        return 1e3 * batch_size / self.step_ms

    @property
    def idle_share(self) -> float:
        """Of the devices' time, on average, in which they compute nothing."""
        computing = sum(stage.compute_ms for stage in self.stages) / len(self.stages)
        return 1 - computing / self.step_ms


@dataclass(frozen=True)
class Setup:
    """What the ways are compared for.

    Arguments:
        local: costs under the local rule.
        backprop: costs under bp.
        batch_size: images a step, over all replicas.
        link: between devices.
        balance: makes the stages.
        most_stages: that the network can be cut into.
    """

    local: CostTable[BlockCost]
    backprop: CostTable[BackpropCost]
    batch_size: int
    link: Link
    balance: Balance
    most_stages: int

    @property
    def one_device_ms(self) -> float:
        """A step of the local rule on one device."""
        return sum(cost.step_ms for cost in self.local.at(self.batch_size))

    @property
    def one_device_backprop_ms(self) -> float:
        return sum(cost.step_ms for cost in self.backprop.at(self.batch_size))

    @property
    def most_replicas(self) -> int:
        """Each of them has as many images as the smallest batch that was measured."""
        return max(1, self.batch_size // self.local.smallest)


def factorisations(num_devices: int, most_stages: int, most_replicas: int) -> list[tuple[int, int]]:
    """Numbers of stages and replicas whose product is that of the devices."""
    return [
        (num_devices // num_replicas, num_replicas)
        for num_replicas in range(1, min(num_devices, most_replicas) + 1)
        if num_devices % num_replicas == 0 and num_devices // num_replicas <= most_stages
    ]


def predict_local(setup: Setup, num_stages: int, num_replicas: int) -> Prediction:
    """Of the local rule, spread over stages times replicas.

    A stage works on a batch while the one before works on the next; what a stage hands on travels
    meanwhile. So a step takes as long as the slowest stage or link. A replica of a stage has its
    share of the batch, and reduces a block's gradients while later blocks compute; one block's
    after another's.
    """
    link = setup.link
    *blocks, output = setup.local.at(math.ceil(setup.batch_size / num_replicas))
    times = [block.step_ms for block in blocks]
    times[-1] += output.step_ms
    stages = []
    for begin, end in _spans(setup.balance(times, num_stages)):
        is_last = end == len(blocks)
        part = [*blocks[begin:end], *([output] if is_last else [])]
        received = part[0].input_bytes if begin > 0 else 0
        handed_on = 0 if is_last else blocks[end].input_bytes
        compute = 0.0
        reduced = 0.0  # when the gradients of the blocks so far are
        for block in part:
            compute += block.step_ms
            reduced = max(reduced, compute) + link.ring_ms(block.num_param_bytes, num_replicas)
        params = sum(block.num_param_bytes for block in part)
        passed_round = 2 * (num_replicas - 1) / num_replicas * params
        stages.append(
            StageLoad(
                tuple(block.name for block in part),
                compute,
                link.host_ms(received + handed_on + 2 * passed_round),
                reduced - compute,
                0.0 if is_last else link.transfer_ms(handed_on),
                handed_on + passed_round,
            )
        )
    step_ms, bound_by = _slowest(stages)
    return Prediction(
        way=_way(num_stages, num_replicas),
        num_devices=num_stages * num_replicas,
        num_stages=num_stages,
        num_replicas=num_replicas,
        num_micro_batches=None,
        step_ms=step_ms,
        fill_ms=sum(stage.busy_ms + stage.link_ms for stage in stages) - step_ms,
        speedup=setup.one_device_ms / step_ms,
        bound_by=bound_by,
        stages=tuple(stages),
    )


def predict_gpipe(setup: Setup, num_stages: int, num_micro_batches: int) -> Prediction:
    """Of backpropagation through a pipeline: every micro-batch forward, then every one backward,
    then the update; activations are kept and not computed again.

        stage 0   F0 F1 F2 .  .  .  .  B0 B1 B2 U
        stage 1   .  F0 F1 F2 B0 B1 B2 .  .  .  U
                              ^ here with forwards as long as backwards

    A stage begins with a micro-batch when it is free and the values are there; they travel while
    others are computed, one after another over each link and direction. Of equal stages and free
    links this is GPipe's bubble, (L - 1) / (m + L - 1) of the time.
    """
    link = setup.link
    costs = setup.backprop.at(setup.batch_size // num_micro_batches)
    *blocks, output = costs
    times = [block.forward_ms + block.backward_ms for block in blocks]
    times[-1] += output.forward_ms + output.backward_ms
    parts: list[list[BackpropCost]] = []
    handed_on: list[float] = []  # bytes, of a micro-batch, to the next stage
    for begin, end in _spans(setup.balance(times, num_stages)):
        is_last = end == len(blocks)
        parts.append([*blocks[begin:end], *([output] if is_last else [])])
        handed_on.append(0 if is_last else blocks[end].input_bytes)
    # Of a forward, the values that come in and go out; of a backward, their gradients.
    hosts = [link.host_ms(sum(pair)) for pair in zip(handed_on, [0, *handed_on], strict=False)]
    forward = [sum(b.forward_ms for b in part) for part in parts]
    backward = [sum(b.backward_ms for b in part) for part in parts]
    update = [sum(b.update_ms for b in part) for part in parts]
    pipeline = _Pipeline(
        [a + b for a, b in zip(forward, hosts, strict=True)],
        [a + b for a, b in zip(backward, hosts, strict=True)],
        update,
        [link.transfer_ms(num) for num in handed_on[:-1]],
    )
    step_ms = pipeline.step_ms(num_micro_batches)
    m = num_micro_batches
    stages = [
        StageLoad(
            tuple(b.name for b in part),
            m * (forward[s] + backward[s]) + update[s],
            2 * m * hosts[s],
            0.0,
            m * link.transfer_ms(handed_on[s]) if s + 1 < num_stages else 0.0,
            m * (handed_on[s] + (handed_on[s - 1] if s else 0)),
        )
        for s, part in enumerate(parts)
    ]
    return Prediction(
        way="gpipe",
        num_devices=num_stages,
        num_stages=num_stages,
        num_replicas=1,
        num_micro_batches=m,
        step_ms=step_ms,
        fill_ms=0.0,  # in every step, and in its time
        speedup=setup.one_device_backprop_ms / step_ms,
        bound_by=_slowest(stages)[1],
        stages=tuple(stages),
    )


@dataclass
class _Pipeline:
    """Stages' times of a micro-batch, and of each link's message."""

    forward_ms: list[float]
    backward_ms: list[float]
    update_ms: list[float]
    link_ms: list[float]

    def step_ms(self, num_micro_batches: int) -> float:
        """From the end of a first step to that of the next, which may begin before the last stage's
        update is over."""
        num = len(self.forward_ms)
        free = [0.0] * num
        ends = []
        for _ in range(2):
            for times, order in (
                (self.forward_ms, range(num)),
                (self.backward_ms, range(num - 1, -1, -1)),
            ):
                link_free = [0.0] * num
                for _ in range(num_micro_batches):
                    arrived = 0.0
                    for place, stage in enumerate(order):
                        free[stage] = max(free[stage], arrived) + times[stage]
                        if place + 1 < num:
                            between = min(stage, order[place + 1])
                            begun = max(link_free[between], free[stage])
                            link_free[between] = begun + self.link_ms[between]
                            arrived = link_free[between]
            free = [moment + ms for moment, ms in zip(free, self.update_ms, strict=True)]
            ends.append(max(free))
        return ends[1] - ends[0]


@dataclass(frozen=True)
class Plan:
    """The ways to use so many devices.

    Attributes:
        num_devices: N.
        local: each factorisation of N into stages and replicas that the network and the batch
            allow, fastest first.
        gpipe: with as many stages as there are devices (or as the network can be cut into), for
            each number of micro-batches, fastest first.
    """

    num_devices: int
    local: tuple[Prediction, ...]
    gpipe: tuple[Prediction, ...]

    def way(self, name: str) -> Prediction | None:
        """One of the local ones by its name; None where it can't be."""
        return next((each for each in self.local if each.way == name), None)


def plan_for(setup: Setup, num_devices: int) -> Plan:
    """All ways to use so many devices."""
    shapes = factorisations(num_devices, setup.most_stages, setup.most_replicas)
    local = [predict_local(setup, *shape) for shape in shapes]
    num_stages = min(num_devices, setup.most_stages)
    # On one device there is nothing to overlap.
    numbers = _micro_batch_numbers(setup) if num_stages > 1 else [1]
    gpipe = [predict_gpipe(setup, num_stages, m) for m in numbers]
    return Plan(
        num_devices,
        tuple(sorted(local, key=lambda each: each.step_ms)),
        tuple(sorted(gpipe, key=lambda each: each.step_ms)),
    )


def speedup_curves(setup: Setup, most_devices: int) -> dict[str, list[float | None]]:
    """Way -> speed-up over one device of the same rule, for 1, 2, ... devices.

    "layers" has as many stages as can be; "data" is None where the batch is too small; "best" is
    the best of both with as many devices or fewer; "gpipe" at its best number of micro-batches.
    """
    curves: dict[str, list[float | None]] = {"layers": [], "data": [], "best": [], "gpipe": []}
    best = 0.0
    for num_devices in range(1, most_devices + 1):
        plan = plan_for(setup, num_devices)
        best = max([best, *(each.speedup for each in plan.local)])
        num_stages = min(num_devices, setup.most_stages)
        curves["layers"].append(predict_local(setup, num_stages, 1).speedup)
        fits = num_devices <= setup.most_replicas
        curves["data"].append(predict_local(setup, 1, num_devices).speedup if fits else None)
        curves["best"].append(best)
        curves["gpipe"].append(plan.gpipe[0].speedup)
    return curves


def _micro_batch_numbers(setup: Setup) -> list[int]:
    """By halves of the batch, down to what was measured."""
    numbers = [1]
    while True:
        more = 2 * numbers[-1]
        if setup.batch_size % more or setup.batch_size // more < setup.backprop.smallest:
            return numbers
        numbers.append(more)


def _way(num_stages: int, num_replicas: int) -> str:
    """As `--parallel` takes it."""
    words = [f"layers:{num_stages}"] if num_stages > 1 or num_replicas == 1 else []
    return ",".join([*words, *([f"data:{num_replicas}"] if num_replicas > 1 else [])])


def _spans(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in sizes:
        yield begin, begin + size
        begin += size


def _slowest(stages: Sequence[StageLoad]) -> tuple[float, str]:
    """The stage or link that takes longest: its ms, and its name, counted from 0."""
    loads = [(stage.busy_ms, f"stage {number}") for number, stage in enumerate(stages)]
    loads += [(stage.link_ms, f"link {number}") for number, stage in enumerate(stages)]
    return max(loads, key=lambda load: load[0])
