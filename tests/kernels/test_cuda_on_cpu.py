"""What runs CUDA sources on the CPU sees wrong ones; and no order of threads changes a bit."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.kernels import cuda_on_cpu
from tests.kernels.checks import (
    Trajectory,
    arrange,
    block_inputs,
    gradients_of,
    head_inputs,
    official_basis,
    randn,
)
from tests.kernels.cuda_on_cpu import Device
from tests.kernels.guarded_memory import GuardedMemory
from torch import Tensor

from locallearn.kernels.cuda.compilation import Program
from locallearn.kernels.interface import Crops

_HEAD = 'extern "C" __global__ void __launch_bounds__(64) kernel(float* values, int count) '
_TOTAL = """
__device__ inline void add_up(float (&values)[3]) {
  __shared__ float shared[3][64];
  for (int j = 0; j < 3; ++j) shared[j][threadIdx.x] = values[j];
  for (int offset = 16; offset > 0; offset /= 2) {
    for (int j = 0; j < 3; ++j) values[j] += __shfl_xor_sync(0xffffffffu, values[j], offset);
  }
  for (int j = 0; j < 3; ++j) shared[j][threadIdx.x] += values[j];
}
"""
KERNELS = {
    # Thread i leaves what its neighbour in the other warp reads.
    "right": """{
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  values[threadIdx.x] = shared[threadIdx.x ^ 32];
}""",
    "no barrier": """{
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  values[threadIdx.x] = shared[threadIdx.x ^ 32];
}""",
    "dynamic, no barrier": """{
  extern __shared__ float shared[];
  shared[threadIdx.x] = threadIdx.x;
  values[threadIdx.x] = shared[threadIdx.x ^ 32];
}""",
    "a thread ends before the barrier": """{
  if (threadIdx.x == count) return;
  __syncthreads();
  values[threadIdx.x] = 1;
}""",
    "half a warp shuffles": """{
  float value = 1;
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
  values[threadIdx.x] = value;
}""",
    "a warp shuffles, the other waits": """{
  float value = threadIdx.x;
  if (threadIdx.x < 32) value = __shfl_xor_sync(0xffffffffu, value, 1);
  __syncthreads();
  values[threadIdx.x] = value;
}""",
    "halves of a warp shuffle in two places": """{
  float value = threadIdx.x;
  if (threadIdx.x % 32 < 16) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value *= __shfl_xor_sync(0xffffffffu, value, 1);
  }
  values[threadIdx.x] = value;
}""",
    "halves of a warp call what shuffles": """{
  float own[3] = {1, 2, 3};
  if (threadIdx.x % 32 < 16) {
    add_up(own);
  } else {
    own[0] = threadIdx.x;
    add_up(own);
  }
  values[threadIdx.x] = own[0];
}""",
    "warps at two barriers": """{
  if (threadIdx.x < 32) {
    values[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
    values[threadIdx.x] = 2;
  }
}""",
    "lanes are left out": """{
  values[threadIdx.x] = __shfl_xor_sync(0xfffffffeu, 1.0f, 1);
}""",
    "beyond the warp": """{
  values[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 32);
}""",
    "a barrier in a loop": """{
  for (int i = 0; i < count; ++i) {
    float own[3] = {1.0f * i, 0, 0};
    add_up(own);
    __syncthreads();
    values[threadIdx.x] = own[0];
  }
}""",
    "misaligned": """{
  struct alignas(16) Packed { float of[4]; };
  Packed packed = {};
  if (threadIdx.x == 0) *reinterpret_cast<Packed*>(values + count) = packed;
}""",
    "an index beyond an array": """{
  float own[3];
  own[threadIdx.x == 63 ? count : 0] = 1;
  values[threadIdx.x] = own[0];
}""",
    "too large an int": """{
  values[threadIdx.x] = static_cast<int>(threadIdx.x) + 0x7fffffff - 60;
}""",
    "a shift": """{
  values[threadIdx.x] = 1 << (static_cast<int>(threadIdx.x) + count);
}""",
    "behind the end": """{
  values[threadIdx.x + 1] = threadIdx.x;
}""",
    "before the begin": """{
  values[static_cast<int>(threadIdx.x) - 1] = threadIdx.x;
}""",
}


@pytest.fixture
def sources(emulated_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(name: str, *, without: str) -> str:
        return _TOTAL + _HEAD + KERNELS[name]

    monkeypatch.setattr(cuda_on_cpu, "source_text", text)


def run(
    device: Device, name: str, values: Tensor, *more: object, is_reversed: bool = False
) -> None:
    device.is_reversed = is_reversed
    arguments = [ctypes.c_void_p(values.data_ptr()), *(more or [ctypes.c_int(3)])]
    device.run(Program(name, ()), "kernel", (1,), (64,), arguments, 4 * 64)


@pytest.mark.usefixtures("sources")
def test_threads_that_wait_for_each_other(emulated_device: Device) -> None:
    threads = torch.arange(64)
    for is_reversed in (False, True):
        values = torch.full((64,), -1.0)
        run(emulated_device, "right", values, is_reversed=is_reversed)
        assert torch.equal(values, (threads ^ 32).float())
        run(emulated_device, "a warp shuffles, the other waits", values, is_reversed=is_reversed)
        assert torch.equal(values, torch.where(threads < 32, threads ^ 1, threads).float())


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("name", ["no barrier", "dynamic, no barrier"])
def test_a_missing_barrier_is_seen(name: str, emulated_device: Device) -> None:
    right, results = (torch.arange(64) ^ 32).float(), []
    for is_reversed in (False, True):
        values = torch.empty(64)
        run(emulated_device, name, values, is_reversed=is_reversed)
        assert not torch.equal(values, right)
        results.append(values)
    assert not torch.equal(*results)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("name", ["a thread ends before the barrier", "half a warp shuffles"])
def test_threads_that_wait_in_vain_are_seen(
    name: str, is_reversed: bool, emulated_device: Device
) -> None:
    with pytest.raises(AssertionError, match="kernel: threads wait for others that have ended"):
        run(emulated_device, name, torch.empty(64), is_reversed=is_reversed)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("halves of a warp shuffle in two places", "lanes wait in different shuffles"),
        ("halves of a warp call what shuffles", "lanes wait in different shuffles"),
        ("warps at two barriers", "threads wait at different barriers"),
        ("lanes are left out", "a shuffle leaves lanes out"),
        ("beyond the warp", "a shuffle beyond the warp"),
    ],
)
def test_threads_that_wait_at_different_places_are_seen(
    name: str, problem: str, is_reversed: bool, emulated_device: Device
) -> None:
    with pytest.raises(AssertionError, match=f"kernel: {problem}$"):
        run(emulated_device, name, torch.empty(64), is_reversed=is_reversed)
    # It goes on afterwards.
    values = torch.empty(64)
    run(emulated_device, "a barrier in a loop", values, is_reversed=is_reversed)
    assert values.tolist() == [64.0] * 64


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("misaligned", "a misaligned access"),
        ("an index beyond an array", "an index beyond an array"),
        ("too large an int", "an overflow"),
        ("a shift", "a shift by too many bits, or of a sign"),
    ],
)
def test_what_the_compiler_checks_is_seen(name: str, problem: str, emulated_device: Device) -> None:
    if not cuda_on_cpu.checks():
        pytest.skip("the compiler has no such checks")
    with pytest.raises(AssertionError, match=rf"kernel: {problem}, line \d+ of what was compiled$"):
        run(emulated_device, name, torch.empty(64))
    values = torch.empty(64)
    run(emulated_device, "right", values)
    assert torch.equal(values, (torch.arange(64) ^ 32).float())


def test_a_fault_of_the_headers_is_no_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every test of the kernels would be skipped for it, and the rest pass."""
    if reason := cuda_on_cpu.missing():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_on_cpu, "_headers", lambda: "broken")
    assert cuda_on_cpu.missing.__wrapped__() is None
    with pytest.raises(AssertionError, match="broken"):
        cuda_on_cpu._library(tmp_path, Program("augment.cu", ()))


@pytest.mark.usefixtures("sources")
def test_arguments_that_the_kernel_does_not_take_are_seen(emulated_device: Device) -> None:
    one = ctypes.c_int(1)
    for more in ([ctypes.c_float(1)], [], [one, one], [ctypes.c_double(1)], [ctypes.c_void_p()]):
        values = [ctypes.c_void_p(), *more]
        with pytest.raises(AssertionError, match="kernel"):
            emulated_device.run(Program("right", ()), "kernel", (1,), (64,), values, 0)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("name", "where"), [("behind the end", "behind"), ("before the begin", "before")]
)
def test_a_write_outside_a_tensor_is_seen(name: str, where: str, emulated_device: Device) -> None:
    with pytest.MonkeyPatch.context() as patch:
        memory = GuardedMemory()
        memory.install(patch)
        tensors = [torch.empty(64), torch.empty_like(torch.zeros(8, 8))]
    assert all(t.isnan().all() for t in tensors)
    assert all(t.data_ptr() % 16 == 0 for t in tensors)
    memory.check()
    run(emulated_device, "right", tensors[0])
    memory.check()
    run(emulated_device, name, tensors[1])
    with pytest.raises(AssertionError, match=f"written {where}"):
        memory.check()


def every_op(kernels: ModuleType) -> list[Tensor]:
    """What the ops make of inputs that several groups of slots, chunks and blocks share."""
    torch.manual_seed(0)
    results: list[Tensor | None] = []
    for shape, size, max_pool in [((4, 20, 9, 9), 2, 2), ((3, 20, 32, 8), 1, 1), ((4, 40), 1, 1)]:
        z, _, gamma, beta = block_inputs(shape, torch.float32, "channels_last")
        stats = kernels.channel_stats(z, gamma.clone(), gamma.abs(), eps=1e-5)
        options = {"negative_slope": 0.1, "latent_size": size, "max_pool": max_pool}
        output, moments = kernels.block_forward(z, stats, gamma, beta, **options)
        results += [*stats, output, *moments]
        for num_classes in (5, 70):
            length = shape[1] * size * size if len(shape) == 4 else 16
            *_, labels = head_inputs(shape, num_classes)
            shared = {"normalize": True, "temperature": 0.5, "needs_grad_projection": True}
            for projection in (
                randn(num_classes, length),
                official_basis(num_classes, length, is_square=False),
            ):
                head = kernels.local_head(moments, gamma, beta, projection, labels, **shared)
                results += head
        gradients = (stats, gamma, beta, head.grad_gamma, head.grad_beta)
        mine = arrange(z, "channels_last")
        results.append(
            kernels.block_backward(mine, head.grad_latents, *gradients, negative_slope=0.1)
        )
        mine = arrange(z, "channels_last")
        results += kernels.norm_backward(mine, z, stats, gamma, beta, negative_slope=0.1)

    trajectory = Trajectory(kernels, torch.float32, lr=0.01)
    trajectory.step(gradients_of(0), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    results += [*trajectory.tensors(), *trajectory.state]

    numbers = torch.tensor([0, 1])
    crops = Crops(
        pixels=torch.randint(256, (50, 3), dtype=torch.uint8),
        offsets=numbers,
        heights=numbers + 5,
        widths=numbers + 6,
        top=-numbers,
        left=numbers,
        flip=numbers == 1,
        box=torch.tensor([[0, 0, 2, 2]] * 2, dtype=torch.int32),
    )
    results.append(kernels.augment(crops, randn(3), randn(3).abs(), size=(20, 15)))
    return [t for t in results if t is not None]


def test_no_bit_depends_on_the_order_of_threads_and_blocks(
    cuda_kernels: ModuleType, emulated_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = importlib.import_module("locallearn.kernels.cuda.common")
    monkeypatch.setattr(common, "MAX_CHUNKS", 40)
    monkeypatch.setattr(common, "_ROWS_OF_A_THREAD", 1)
    results = []
    for emulated_device.is_reversed in (False, True):
        results.append(every_op(cuda_kernels))
    assert len(results[0]) == len(results[1]) > 60
    for ascending, descending in zip(*results, strict=True):
        assert torch.equal(ascending, descending)
        assert not ascending.isnan().any()
    assert {name for _, name, _, _ in emulated_device.launches} >= {"channel_stats", "directions"}
