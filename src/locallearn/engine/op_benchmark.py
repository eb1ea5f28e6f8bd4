"""Each op of a step by itself, beside the least time that its bytes or MACs can take.

The floors are this machine's own: the bandwidth of a copy, and the rate of a matrix product, as
measured in the same run. A convolution's floor is of MACs, every other op's of bytes. Backends are
timed in turn. On CUDA an op runs many times over in a captured graph, as steps are run: launched by
themselves most ops would take longer to launch than to run.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.kernels import Kernels, ScheduleFreeState, load_kernels
from locallearn.models import Block, BlockNetwork, ConvBlock, LinearBlock

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
    """Every op of an LLS step in every convolution and linear block, by each backend.

    A depthwise-separable block has two of each and a backward between; it is left out.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rates = measure_rates(device, dtype, num_rounds)
    rows: list[OpTime] = []
    for name, block, shape in _input_shapes(model, image_shape, batch_size):
        if not isinstance(block, ConvBlock | LinearBlock):
            continue
        block.to(device)
        calls = {
            backend: _calls(block, shape, num_classes, load_kernels(backend), dtype)
            for backend in backends
        }
        for op, (call, num_bytes, num_macs) in calls[backends[0]].items():
            floor_ms = num_bytes / rates.bandwidth_gb_s / 1e6 + num_macs / rates.macs_g_s / 1e6
            sides = {backend: calls[backend][op][0] for backend in backends}
            times = _medians_ms({TORCH: call} if num_macs else sides, device, num_rounds)
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
        (name, op): num_bytes
        for name, block, shape in _input_shapes(model, image_shape, batch_size)
        if isinstance(block, ConvBlock | LinearBlock)
        for op, (_, num_bytes, num_macs) in _calls(
            block, shape, num_classes, load_kernels("reference"), dtype
        ).items()
        if not num_macs
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

    def timer() -> float:
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)

    return timer


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


def _input_shapes(
    model: BlockNetwork, image_shape: tuple[int, int, int], batch_size: int
) -> list[tuple[str, Block, torch.Size]]:
    """Name, block and input shape of every block, from a forward on the meta device."""
    shapes: dict[str, torch.Size] = {}
    twin = copy.deepcopy(model).to("meta").eval()
    for name, module in twin.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: shapes.update({name: inputs[0].shape})
            )
    with torch.no_grad():
        twin(torch.empty(batch_size, *image_shape, device="meta"))
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, Block)}
    return [(name, blocks[name], shape) for name, shape in shapes.items()]


Call = tuple[Callable[[], object], int, int]


def _calls(
    block: ConvBlock | LinearBlock,
    shape: torch.Size,
    num_classes: int,
    kernels: Kernels,
    dtype: torch.dtype,
) -> dict[str, Call]:
    """Op -> what calls it, the bytes it must move and the MACs it must do."""
    layer = block.conv if isinstance(block, ConvBlock) else block.linear
    weight = layer.weight.detach().to(dtype)
    device = weight.device
    x = torch.randn(shape, device=device).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    geometry: tuple[Any, ...] = ()
    if isinstance(layer, nn.Conv2d):
        geometry = (None, layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)

    def forward() -> Tensor:
        if not geometry:
            return nn.functional.linear(x, weight)
        return torch.ops.aten.convolution(x, weight, *geometry)  # type: ignore[no-any-return]

    z = forward()
    gradient = torch.randn_like(z)

    def weight_gradient() -> object:
        if not geometry:
            return gradient.T @ x
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, *geometry, [False, True, False]
        )

    assert isinstance(block.norm, nn.BatchNorm1d | nn.BatchNorm2d)
    gamma, beta = block.norm.weight.detach(), block.norm.bias.detach()
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    slope: dict[str, Any] = {"negative_slope": block.nonlinearity.negative_slope}
    pool: dict[str, Any] = {
        "latent_size": block.latent_size,
        "max_pool": getattr(block.pool, "kernel_size", 1),
    }
    stats = kernels.channel_stats(z, mean, var, eps=1e-5)
    output, moments = kernels.block_forward(z, stats, gamma, beta, **slope, **pool)
    assert moments is not None
    projection = torch.randn(num_classes, block.latent_length, device=device)
    labels = torch.randint(num_classes, (shape[0],), device=device)
    head: dict[str, Any] = {"normalize": True, "temperature": 0.5}
    result = kernels.local_head(moments, gamma, beta, projection, labels, **head)
    written = gradient.clone(memory_format=torch.preserve_format)
    layout = torch.preserve_format
    y = [p.detach().clone(memory_format=layout) for p in (layer.weight, gamma, beta)]
    gradients, z_points, exp_avg_sq = ([torch.rand_like(p) for p in y] for _ in range(3))
    one = torch.ones((), dtype=torch.float64, device=device)
    clock = ScheduleFreeState(one * 10, one.clone(), one * 0.005, one * 0.005)

    def update() -> None:
        kernels.schedulefree_step(
            y,
            gradients,
            z_points,
            exp_avg_sq,
            clock,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
        )

    def backward() -> object:
        return kernels.block_backward(
            written,
            result.grad_latents,
            stats,
            gamma,
            beta,
            result.grad_gamma,
            result.grad_beta,
            **slope,
        )

    z_bytes, width = z.numel() * z.element_size(), z.element_size()
    moment_bytes = 4 * moments.s0.numel()
    num_macs = z.numel() // z.shape[1] * weight.numel()
    head_bytes = 3 * moment_bytes + 2 * 4 * projection.numel()
    return {
        "layer": (forward, 0, num_macs),
        "channel_stats": (lambda: kernels.channel_stats(z, mean, var, eps=1e-5), z_bytes, 0),
        "block_forward": (
            lambda: kernels.block_forward(z, stats, gamma, beta, **slope, **pool),
            z_bytes + output.numel() * width + 2 * moment_bytes,
            0,
        ),
        "local_head": (
            lambda: kernels.local_head(moments, gamma, beta, projection, labels, **head),
            head_bytes,
            0,
        ),
        "block_backward": (backward, 2 * z_bytes + moment_bytes, 0),
        "weight gradient": (weight_gradient, 0, num_macs),
        # Reads y, gradient, z and v; writes y, z and v.
        "schedulefree_step": (update, 7 * 4 * sum(p.numel() for p in y), 0),
    }
