"""Layers in parallel on two processes, beside one process and beside GPipe under backpropagation.

    python benchmarks/layer_parallel.py [--model vgg8] [--json FILE.json]

First `locallearn plan` measures costs and predicts: for one process alone, and for two with
`--devices 2 --beside 1`, whose stages are those that are then run. Then two processes, one thread
each, take turns on noise of CIFAR-10's shape:

    RULE, one process      the local rule; the other process waits
    bp, one process        backpropagation, eager, channels-last
    RULE, layers:2         `locallearn train --parallel layers:2`'s own stages and links
    bp, gpipe:M            torch.distributed.pipelining's ScheduleGPipe, M micro-batches

All with the same optimizer and batch. Of the numbers of micro-batches the two that are fastest in a
first look take part. Gates come before: layers:2 has the bits of one process after some steps, and
gpipe:1 the losses of backpropagation. Time is from the end of a step to the end of the next, once
the pipeline is full; GPipe's is of whole steps. On the CPU, over gloo. Let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from locallearn.data.loader import EpochLoader
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import Processes, joined
from locallearn.distributed.team import ProcessTeam
from locallearn.engine import LocalLearner, TrainConfig
from locallearn.engine.allocator import keep_freed_memory
from locallearn.engine.benchmark import Spread
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import check_target, write_json
from locallearn.engine.measured_steps import MeasuredSteps
from locallearn.engine.optimizers import set_mode
from locallearn.engine.timing import order_of_round
from locallearn.models import BlockNetwork

_NUM_PROCESSES = 2
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_NUM_KEPT = 2  # of these, after a first look
_NUM_FILLING = 2  # steps of a turn until the pipeline is full
_TIMEOUT_SECONDS = 1800
_LOSS_TOLERANCE = 1e-3  # relative, of a step of gpipe:1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vgg8", help="of the package's own")
    parser.add_argument("--rule", default="lls-mxm")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn-seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.json is not None:
        check_target(given.json, "--json")
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    bandwidth, latency = in_processes(measure_link)[0]
    print(f"link: {bandwidth:.2f} GB/s, {latency:.0f} us", flush=True)
    alone = predicted(given, bandwidth, latency, 1)
    plan = predicted(given, bandwidth, latency, _NUM_PROCESSES)
    print(f"predicted after {time.monotonic() - began:.0f} s", flush=True)
    steps = MeasuredSteps(
        model=given.model,
        rule=given.rule,
        batch_size=given.batch_size,
        image_shape=(3, given.image_size, given.image_size),
        num_classes=10,
        precision="fp32",
        device="cpu",
        backend=given.backend,
        num_threads=1,
    )
    sizes = Sizes.of(plan)
    found = in_processes(measure_sides, steps, sizes, given.rounds, given.turn_seconds)
    expected = expectations(given.rule, alone, plan)
    measured = found[_NUM_PROCESSES - 1]["times_ms"]
    rows = [row(side, times, expected[side]) for side, times in measured.items()]
    ratios = compared(given.rule, rows)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "environment": describe_environment("cpu"),
        "num_processes": _NUM_PROCESSES,
        "num_threads": 1,
        "load_average": os.getloadavg(),
        "link": {"bandwidth_gb_s": bandwidth, "latency_us": latency},
        "settings": asdict(steps),
        "blocks_of_stages": asdict(sizes),
        "gate": [each["gate"] for each in found],
        "first_look_ms": found[_NUM_PROCESSES - 1]["first_look_ms"],
        "rows": rows,
        "ratios": ratios,
        "plans": [
            {
                key: each[key]
                for key in ("command", "one_device_ms", "one_device_backprop_ms", "link")
            }
            for each in (alone, plan)
        ],
    }
    for each in rows:
        print(
            f"{each['side']:28} {each['step_time_ms_median']:9.1f} ms a step "
            f"({each['step_time_ms_p20']:.1f} to {each['step_time_ms_p80']:.1f}, "
            f"{each['num_steps']} steps), predicted {each['predicted_ms']:.1f}, "
            f"{100 * each['prediction_error']:+.0f} %"
        )
    for words, ratio in ratios.items():
        print(f"{words}: {ratio:.2f}")
    if given.json is not None:
        write_json(given.json, record)
        print(f"written to {given.json}")
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0


# -- what is expected -----------------------------------------------------------------------------


def predicted(
    given: argparse.Namespace, bandwidth: float, latency: float, num_processes: int
) -> dict[str, Any]:
    """What `locallearn plan` writes for so many processes on this host."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "locallearn", "plan", "--model", given.model]
        command += ["--rule", given.rule, "--batch-size", str(given.batch_size)]
        command += ["--image-size", str(given.image_size), "--backend", given.backend]
        command += ["--devices", str(num_processes), "--beside", str(num_processes - 1)]
        command += ["--bandwidth", str(bandwidth), "--latency", str(latency)]
        command += ["--device", "cpu", "--json", str(file)]
        subprocess.run(command, check=True, timeout=_TIMEOUT_SECONDS, stdout=subprocess.DEVNULL)
        plan: dict[str, Any] = json.loads(file.read_text())
    return plan


def expectations(rule: str, alone: dict[str, Any], plan: dict[str, Any]) -> dict[str, float]:
    """Side -> predicted ms of a step."""
    found = {
        f"{rule}, one process": alone["one_device_ms"],
        "bp, one process": alone["one_device_backprop_ms"],
    }
    found |= {f"{rule}, {each['way']}": each["step_ms"] for each in plan["ways"]}
    found |= {f"bp, gpipe:{each['num_micro_batches']}": each["step_ms"] for each in plan["gpipe"]}
    return found


@dataclass(frozen=True)
class Sizes:
    """Blocks of each stage: of layers:2, and of GPipe by its number of micro-batches."""

    layers: tuple[int, ...]
    gpipe: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, plan: dict[str, Any]) -> Sizes:
        def count(way: dict[str, Any]) -> tuple[int, ...]:
            return tuple(sum(name != "" for name in stage["blocks"]) for stage in way["stages"])

        (layers,) = (each for each in plan["ways"] if each["way"] == f"layers:{_NUM_PROCESSES}")
        gpipe = {each["num_micro_batches"]: count(each) for each in plan["gpipe"]}
        return cls(count(layers), {m: gpipe[m] for m in _MICRO_BATCHES if m in gpipe})


def row(side: str, times_ms: list[float], predicted_ms: float) -> dict[str, Any]:
    """A side's measurement beside its prediction."""
    spread = Spread.of(times_ms)
    return {
        "side": side,
        **{f"step_time_ms_{key}": ms for key, ms in asdict(spread).items()},
        "num_steps": len(times_ms),
        "predicted_ms": predicted_ms,
        "prediction_error": predicted_ms / spread.median - 1,
    }


def compared(rule: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast layers in parallel are, by medians."""
    ms = {each["side"]: each["step_time_ms_median"] for each in rows}
    layers = ms[f"{rule}, layers:{_NUM_PROCESSES}"]
    pipelines = [value for side, value in ms.items() if ", gpipe:" in side]
    return {
        "layers as fast as one process": ms[f"{rule}, one process"] / layers,
        "layers as fast as GPipe": min(pipelines) / layers,
        "GPipe as fast as bp in one process": ms["bp, one process"] / min(pipelines),
    }


# -- the processes --------------------------------------------------------------------------------


def in_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(processes, *arguments)`` returns in each of them, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = [
        context.Process(target=_run, args=(rank, port, results, function, arguments), daemon=True)
        for rank in range(_NUM_PROCESSES)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < _NUM_PROCESSES:
            rank, value, error = results.get(timeout=_TIMEOUT_SECONDS)
            if error is not None:
                raise SystemExit(f"process {rank}:\n{error}")
            found[rank] = value
    except queue.Empty:
        raise SystemExit(f"no result after {_TIMEOUT_SECONDS} s") from None
    finally:
        for process in started:
            process.join(timeout=10 if len(found) == _NUM_PROCESSES else 0)
            process.kill()
    return [found[rank] for rank in range(_NUM_PROCESSES)]


def _run(
    rank: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(_NUM_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        parallelism = Parallelism(num_stages=_NUM_PROCESSES)
        hang_after = float(_TIMEOUT_SECONDS)  # no side says how far it is
        with joined(parallelism, "cpu", _TIMEOUT_SECONDS, hang_after=hang_after) as processes:
            results.put((rank, function(processes, *arguments), None))
            dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def measure_link(processes: Processes) -> tuple[float, float]:
    """GB/s of large messages one way, and microseconds of a small one; alike in both processes."""
    seconds = {}
    for num_bytes in (1024, 16 * 2**20):
        message = torch.zeros(num_bytes, dtype=torch.uint8)
        times = []
        for _ in range(21):
            dist.barrier()
            began = time.perf_counter()
            for sender in range(2):  # there and back
                if processes.rank == sender:
                    dist.send(message, 1 - sender)
                else:
                    dist.recv(message, sender)
            times.append((time.perf_counter() - began) / 2)
        seconds[num_bytes] = statistics.median(times)
    (_, small), (num_large, large) = seconds.items()
    return num_large / (large - small) / 1e9, 1e6 * small


# -- the sides ------------------------------------------------------------------------------------

Turn = Callable[[int], list[float]]
"""So many steps; this process's ms of each, from the end of the one before."""


def measure_sides(
    processes: Processes,
    steps: MeasuredSteps,
    sizes: Sizes,
    rounds: int,
    turn_s: float,
) -> dict[str, Any]:
    """Gates, then all sides in turn. Returns side -> ms of each step, by this process's clock."""
    team, learner = _joined_team(processes, steps, sizes)
    gate = [_check_layers(team, learner, steps), _check_gpipe(processes, steps, sizes)]
    sides: dict[str, Turn] = {
        f"{steps.rule}, one process": _alone(steps, steps.rule),
        "bp, one process": _alone(steps, "bp"),
        f"{steps.rule}, layers:{_NUM_PROCESSES}": _layers(team, steps),
    }
    pipelines = {f"bp, gpipe:{m}": _gpipe(processes, steps, sizes.gpipe[m], m) for m in sizes.gpipe}
    first_look = {}
    for side, turn in (sides | pipelines).items():
        first_look[side] = _agreed(statistics.median(turn(_NUM_FILLING + 3)[_NUM_FILLING:]))
    fastest = sorted(pipelines, key=lambda side: first_look[side])[:_NUM_KEPT]
    sides |= {side: pipelines[side] for side in fastest}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in order_of_round(list(sides), number):
            num = max(3, round(1000 * turn_s / first_look[side]))
            times[side] += sides[side](_NUM_FILLING + num)[_NUM_FILLING:]
        if processes.rank == 0:
            print(f"round {number + 1} of {rounds}", flush=True)
    return {"gate": gate, "times_ms": times, "first_look_ms": first_look}


def _agreed(ms: float) -> float:
    """The last process's figure, in all of them."""
    shared = torch.tensor([ms], dtype=torch.float64)
    dist.broadcast(shared, src=_NUM_PROCESSES - 1)
    return float(shared)


def _timed(step: Callable[[], object], num: int) -> list[float]:
    times = []
    for _ in range(num):
        began = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - began))
    return times


def _alone(steps: MeasuredSteps, rule: str) -> Turn:
    """The last process takes whole steps, and the others wait."""
    images, labels = steps.batch()
    learner = steps.learner(rule)

    def turn(num: int) -> list[float]:
        dist.barrier()
        is_last = dist.get_rank() == _NUM_PROCESSES - 1
        times = _timed(lambda: learner.step(images, labels), num) if is_last else [0.0] * num
        dist.barrier()
        return times

    return turn


class _SameBatch(EpochLoader[None]):
    """An epoch of one batch again and again."""

    def __init__(self, images: Tensor, labels: Tensor, num: int) -> None:
        super().__init__([len(labels) * (n + 1) for n in range(num)])
        self.device = images.device
        self._batch = (images, labels)

    def crops(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[None, Tensor]]:
        for labels in self.batch_labels():
            yield None, labels

    def batch_labels(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        for _ in range(len(self)):
            yield self._batch[1]

    def images(self, crops: None) -> Tensor:
        return self._batch[0]


def _joined_team(
    processes: Processes, steps: MeasuredSteps, sizes: Sizes
) -> tuple[ProcessTeam, LocalLearner]:
    balance = ",".join(map(str, sizes.layers))
    team = ProcessTeam(processes, balance=balance)
    learner = steps.learner(steps.rule)
    images, _ = steps.batch()
    settings = TrainConfig(model=steps.model, batch_size=steps.batch_size)
    team.join(learner, settings, lambda: steps.learner(steps.rule), images)
    return team, learner


def _layers(team: ProcessTeam, steps: MeasuredSteps) -> Turn:
    images, labels = steps.batch()

    def turn(num: int) -> list[float]:
        loader = team.training_loader(_SameBatch(images, labels, num))
        times = []
        dist.barrier()
        before = time.perf_counter()
        with team.working(Path()):
            for batch in loader.epoch():
                team.step(*batch)
                now = time.perf_counter()
                times.append(1000 * (now - before))
                before = now
        dist.barrier()
        return times

    return turn


class _Part(nn.Module):
    """A stage of a network for GPipe. Between stages values lie as (N, H, W, C), as the pipeline
    sends and receives contiguous tensors, and convolutions read channels-last ones.

    Arguments:
        network: the whole.
        sizes: blocks of each stage.
        number: of this stage.
    """

    def __init__(self, network: BlockNetwork, sizes: tuple[int, ...], number: int) -> None:
        super().__init__()
        names = [*network._conv_names, *network._linear_names]
        begin, end = sum(sizes[:number]), sum(sizes[: number + 1])
        self._num_conv = len(network._conv_names)
        self._places = range(begin, end)
        self._is_first, self._is_last = begin == 0, end == len(names)
        self.blocks = nn.ModuleList(network.get_submodule(name) for name in names[begin:end])
        self.pool = network.pool
        self.classifier = network.classifier if self._is_last else None

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_first and x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        for place, block in zip(self._places, self.blocks, strict=True):
            x = block(x)
            if place + 1 == self._num_conv:
                x = self.pool(x).flatten(1)
        if self.classifier is not None:
            logits: Tensor = self.classifier(x)
            return logits
        return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


class _Pipeline:
    """A process's stage under GPipe, with the optimizer that the local rule has."""

    def __init__(
        self, processes: Processes, steps: MeasuredSteps, sizes: tuple[int, ...], num_micro: int
    ) -> None:
        learner = steps.learner("bp")
        assert isinstance(learner.model, BlockNetwork), "GPipe's stages are of own networks"
        self.part = _Part(learner.model, sizes, processes.rank).train()
        self._optimizer = learner.make_optimizer(list(self.part.parameters()))
        set_mode([self._optimizer], training=True)
        self._images, self._labels = steps.batch()
        stage = PipelineStage(self.part, processes.rank, len(sizes), torch.device("cpu"))
        self._schedule = ScheduleGPipe(stage, num_micro, loss_fn=F.cross_entropy)
        self._is_first, self._is_last = processes.rank == 0, processes.rank == len(sizes) - 1

    def step(self) -> float | None:
        """The loss, where it is known."""
        losses: list[Tensor] = []
        if self._is_first:
            self._schedule.step(self._images, return_outputs=False)
        else:
            self._schedule.step(target=self._labels, losses=losses, return_outputs=False)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().item() if losses else None


def _gpipe(
    processes: Processes, steps: MeasuredSteps, sizes: tuple[int, ...], num_micro: int
) -> Turn:
    pipeline = _Pipeline(processes, steps, sizes, num_micro)

    def turn(num: int) -> list[float]:
        dist.barrier()
        times = _timed(pipeline.step, num)
        dist.barrier()
        return times

    return turn


# -- the gates ------------------------------------------------------------------------------------


def _check_layers(team: ProcessTeam, learner: LocalLearner, steps: MeasuredSteps) -> str:
    """Some steps in stages leave the very weights of as many in one process."""
    num = 3
    _layers(team, steps)(num)
    whole = team.training_state()
    if whole is None:  # the first process has it
        return "green"
    images, labels = steps.batch()
    alone = steps.learner(steps.rule)
    for _ in range(num):
        alone.step(images, labels)
    for name, tensor in alone.training_state()["model"].items():
        if not torch.equal(tensor, whole["model"][name]):
            raise SystemExit(f"gate red: {name} has not the bits of one process. No figures.")
    return "green"


def _check_gpipe(processes: Processes, steps: MeasuredSteps, sizes: Sizes) -> str:
    """Some steps of one micro-batch each have the losses of backpropagation."""
    num = 3
    pipeline = _Pipeline(processes, steps, sizes.gpipe[1], 1)
    losses = [pipeline.step() for _ in range(num)]
    if losses[0] is None:  # the last process has them
        return "green"
    images, labels = steps.batch()
    learner = steps.learner("bp")
    for loss in losses:
        expected = float(learner.step(images, labels).loss)
        if loss is None or abs(loss - expected) > _LOSS_TOLERANCE * expected:
            raise SystemExit(f"gate red: GPipe's loss is {loss}, bp's {expected}. No figures.")
    return "green"


if __name__ == "__main__":
    sys.exit(main())
