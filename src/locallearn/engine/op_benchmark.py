"""Each op of a step by itself, beside the least time that its bytes or MACs can take.

The floors are this machine's own: the bandwidth of a copy, and the rate of a matrix product, as
measured in the same run. A convolution's floor is of MACs, every other op's of bytes. Backends are
timed in turn. On CUDA an op runs many times over in a captured graph, as steps are run: launched by
themselves most ops would take longer to launch than to run.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from locallearn.engine.op_calls import calls_of_block, input_shapes
from locallearn.engine.timing import elapsed_ms
from locallearn.kernels import load_kernels
from locallearn.models import BlockNetwork

_COPY_VALUES, _MATRIX_SIDE = 2**24, 2048
_CALLS_A_GRAPH = 16
# Libraries load and kernels compile in the first calls.
_NUM_WARM_UP_CALLS = 3
# Who computes what is no op of ours: convolutions, matrix products, and their weight gradients.
TORCH = "torch"


@dataclass(frozen=True)
class OpTime:
    """An op in a block: what it takes, and what it could at best.

    Arguments:
        block, op: names.
        backend: whose kernels, or TORCH.
        time_ms: median.
        floor_ms: the least that its bytes or MACs can take.
        num_bytes, num_macs: that it must move, and do.
    """

    block: str
    op: str
    backend: str
    time_ms: float
    floor_ms: float
    num_bytes: int
    num_macs: int


@dataclass(frozen=True)
class MachineRates:
    """bandwidth_gb_s: of a copy, read and written; macs_g_s: of a matrix product, 1e9 a second."""

    bandwidth_gb_s: float
    macs_g_s: float


def measure_rates(device: torch.device, dtype: torch.dtype, num_rounds: int = 15) -> MachineRates:
    """What the device reaches on a copy of 64 MiB and on a product of 2048 x 2048 matrices."""
    a = torch.randn(_COPY_VALUES, device=device)
    b = torch.empty_like(a)
    copy_ms = _median_ms(lambda: b.copy_(a), device, num_rounds)
    m = torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device).to(dtype)
    # As cuDNN multiplies in a convolution: on CUDA by default in TF32.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        product_ms = _median_ms(lambda: m @ m, device, num_rounds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return MachineRates(2 * 4 * _COPY_VALUES / copy_ms / 1e6, _MATRIX_SIDE**3 / product_ms / 1e6)


def time_ops(
    model: BlockNetwork,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    num_classes: int,
    backends: Sequence[str],
    precision: str,
    device: torch.device,
    num_rounds: int = 15,
) -> tuple[MachineRates, list[OpTime]]:
    """Every op of an LLS step in every block, by each backend; ops as in `op_calls`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rates = measure_rates(device, dtype, num_rounds)
    rows: list[OpTime] = []
    for name, block, shape in input_shapes(model, image_shape, batch_size):
        block.to(device)
        calls = {
            backend: calls_of_block(block, shape, num_classes, load_kernels(backend), dtype)
            for backend in backends
        }
        for op, first in calls[backends[0]].items():
            num_bytes, num_macs = first.num_bytes, first.num_macs
            floor_ms = num_bytes / rates.bandwidth_gb_s / 1e6 + num_macs / rates.macs_g_s / 1e6
            sides = {backend: calls[backend][op].run for backend in backends}
            times = _medians_ms({TORCH: first.run} if num_macs else sides, device, num_rounds)
            rows += [
                OpTime(name, op, backend, time_ms, floor_ms, num_bytes, num_macs)
                for backend, time_ms in times.items()
            ]
    return rates, rows


def count_bytes(
    model: BlockNetwork,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    num_classes: int,
    precision: str,
) -> dict[tuple[str, str], int]:
    """Block and op -> the bytes that it must move; of the blocks and ops of `time_ops`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        (name, op): call.num_bytes
        for name, block, shape in input_shapes(model, image_shape, batch_size)
        for op, call in calls_of_block(
            block, shape, num_classes, load_kernels("reference"), dtype
        ).items()
        if not call.num_macs
    }


def _median_ms(call: Callable[[], object], device: torch.device, num_rounds: int) -> float:
    return _medians_ms({"": call}, device, num_rounds)[""]


def _medians_ms(
    calls: Mapping[str, Callable[[], object]], device: torch.device, num_rounds: int
) -> dict[str, float]:
    """Name -> median, of calls in turn."""
    clock = _on_cuda if device.type == "cuda" else _on_cpu
    timers = {name: clock(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: statistics.median(each) for name, each in times.items()}


def _on_cpu(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """What takes a call's time in ms, once the call is warm."""
    for _ in range(_NUM_WARM_UP_CALLS):
        call()
    return functools.partial(elapsed_ms, call, device)


def _on_cuda(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """As :func:`_on_cpu`, of calls that a graph replays one after the other."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_NUM_WARM_UP_CALLS):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_CALLS_A_GRAPH):
            call()
    graph.replay()
    begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def timer() -> float:
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / _CALLS_A_GRAPH

    return timer
