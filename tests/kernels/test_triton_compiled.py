"""Every Triton kernel compiles ahead of time for GPUs that are not here, and spills no register.

What is compiled is what the launchers would launch on VGG8's blocks: they run on empty CPU tensors
while the launches are recorded. No device is needed, and none is used.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import locallearn.kernels.triton as kernels
from locallearn.kernels.interface import ChannelStats, Crops, PeriodicBasis, ScheduleFreeState

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BATCH_SIZE = 128
NUM_CLASSES = 10
# channels, height and width, latent size, max-pool
# Of VGG8's six: the other two differ from one of these in how often its loops run.
CONVOLUTIONS = [(128, 32, 4, 1), (256, 16, 2, 2), (512, 8, 2, 2), (512, 4, 2, 1)]
NUM_FEATURES = 1024
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def kernel_modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + ".")]
    return [importlib.import_module(name) for name in names]


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    return {
        name: f
        for name, f in vars(module).items()
        if isinstance(f, JITFunction) and name.endswith("_kernel")
    }


class Specialization(NamedTuple):
    """What Triton compiles for a launch."""

    function: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # positions of the arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(kind for _, kind in self.signature if kind.startswith("*"))

    @classmethod
    def of_launch(
        cls, function: JITFunction, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Specialization:
        values = dict(zip(function.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, []
        for i, name in enumerate(function.arg_names):
            value = values.pop(name)
            is_one = type(value) is int and value == 1
            if function.params[i].is_constexpr or value is None or is_one:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                divisible.append(i)  # as fresh memory is
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                assert type(value) is int
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(i)
        assert values.keys() <= {"num_warps", "enable_fp_fusion"}
        return cls(
            function,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(divisible),
            tuple(values.items()),
        )

    def compile(self, target: GPUTarget, **options: object) -> CompiledKernel:
        source = ASTSource(
            self.function,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in self.divisible},
        )
        return triton.compile(source, target, dict(self.options) | options)


class Recorder:
    """Stands for a kernel, and notes its launches instead of doing them."""

    def __init__(self, function: JITFunction, launches: list[Specialization]) -> None:
        self.function = function
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31
        assert all(0 < size < 2**16 for size in grid[1:])

        def launch(*args: object, **kwargs: object) -> None:
            self.launches.append(Specialization.of_launch(self.function, args, kwargs))

        return launch


class Resources(NamedTuple):
    """Registers of a thread, and what did not fit: bytes on the stack, or registers spilled."""

    registers: int
    spilled: int


def resources(compiled: CompiledKernel, target: GPUTarget, folder: Path) -> Resources:
    if target.backend == "hip":
        report = compiled.asm["amdgcn"]
        fields = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        registers, *spilled = (
            int(re.search(rf"\.{field}:\s+(\d+)", report).group(1)) for field in fields
        )
        return Resources(registers, sum(spilled))
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, found)
    return Resources(registers, stack + local)


def launch_block(z: Tensor, size: int, max_pool: int) -> None:
    """Every op of a block, with its basis given and with its basis made on the fly."""
    num_channels = z.shape[1]
    length = num_channels * size * size if z.ndim == 4 else num_channels
    of_channel = torch.empty(num_channels)
    labels = torch.empty(len(z), dtype=torch.int64)
    phases = torch.empty(NUM_CLASSES, dtype=torch.float64)
    options = {"negative_slope": 0.01}

    stats = kernels.channel_stats(z, of_channel, of_channel, eps=1e-5)
    _, moments = kernels.block_forward(
        z, stats, of_channel, of_channel, latent_size=size, max_pool=max_pool, **options
    )
    for projection, is_learned in [
        (PeriodicBasis(phases, phases, length, is_square=False), False),
        (torch.empty(NUM_CLASSES, length), True),
    ]:
        head = kernels.local_head(
            moments,
            of_channel,
            of_channel,
            projection,
            labels,
            normalize=True,
            temperature=0.5,
            needs_grad_projection=is_learned,
        )
    per_channel = [of_channel] * 4
    kernels.block_backward(z, head.grad_latents, stats, *per_channel, **options)
    kernels.norm_backward(z, torch.empty_like(z), stats, *per_channel[:2], **options)


def launch_others() -> None:
    """What VGG8 on CIFAR-10 does not launch, or not for each block."""
    # Overlapping cells, and windows across them: a 7 x 7 image.
    z = torch.empty(BATCH_SIZE, 64, 7, 7, dtype=torch.bfloat16)
    z = z.contiguous(memory_format=torch.channels_last)
    of_channel = torch.empty(64)
    stats = ChannelStats(of_channel, of_channel)
    options = {"negative_slope": 0.01}
    _, moments = kernels.block_forward(
        z, stats, of_channel, of_channel, latent_size=2, max_pool=2, **options
    )
    kernels.block_backward(z, moments.s0, stats, *[of_channel] * 4, **options)

    # Many classes; a latent shorter than the features.
    labels = torch.empty(BATCH_SIZE, dtype=torch.int64)
    phases = torch.empty(1000, dtype=torch.float64)
    shared = {"normalize": True, "temperature": 0.5}
    basis = PeriodicBasis(phases, phases, 256, is_square=True)
    kernels.local_head(moments, of_channel, of_channel, basis, labels, **shared)
    features = torch.empty(BATCH_SIZE, NUM_FEATURES)
    of_feature = torch.empty(NUM_FEATURES)
    few = basis._replace(turns=phases[:NUM_CLASSES], first_phase=phases[:NUM_CLASSES])
    linear = type(moments)(features, features)
    kernels.local_head(linear, of_feature, of_feature, few, labels, **shared)

    parameters = [torch.empty(256, 128, 3, 3), torch.empty(256)]
    for more in ({}, {"averages_by_bias_correction": True}, {"r": 0.5, "warmup_steps": 10}):
        kernels.schedulefree_step(
            *[parameters] * 4,
            ScheduleFreeState(*torch.empty(4, dtype=torch.float64)),
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            **more,
        )
    numbers = torch.empty(BATCH_SIZE, dtype=torch.int64)
    crops = Crops(
        pixels=torch.empty(1000, 3, dtype=torch.uint8),
        offsets=numbers,
        heights=numbers,
        widths=numbers,
        top=numbers,
        left=numbers,
        flip=torch.empty(BATCH_SIZE, dtype=torch.bool),
        box=torch.empty(BATCH_SIZE, 4, dtype=torch.int32),
    )
    for dtype in (torch.float32, torch.bfloat16):
        kernels.augment(crops, torch.empty(3), torch.empty(3), size=(32, 32), dtype=dtype)


@pytest.fixture(scope="module")
def specializations() -> list[Specialization]:
    """What the launchers launch, each once."""
    launches: list[Specialization] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in kernel_modules():
            for name, function in kernels_of(module).items():
                patch.setattr(module, name, Recorder(function, launches))
        for dtype in (torch.float32, torch.bfloat16):
            for channels, height, size, max_pool in CONVOLUTIONS:
                z = torch.empty(BATCH_SIZE, channels, height, height, dtype=dtype)
                launch_block(z.contiguous(memory_format=torch.channels_last), size, max_pool)
            launch_block(torch.empty(BATCH_SIZE, NUM_FEATURES, dtype=dtype), 1, 1)
        launch_others()
    return list(dict.fromkeys(launches))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def test_every_kernel_is_launched(specializations: list[Specialization]) -> None:
    everyone = {name for module in kernel_modules() for name in kernels_of(module)}
    assert {s.function.__name__ for s in specializations} == everyone


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kernels_compile_without_spills(
    target: GPUTarget, specializations: list[Specialization], tmp_path: Path
) -> None:
    chosen = specializations
    if target.backend == "hip":  # the types of each kernel once: its compiler takes twice as long
        chosen = list({(s.function, s.types): s for s in specializations}.values())
        assert {s.function for s in chosen} == {s.function for s in specializations}
    for specialization in chosen:
        registers, spilled = resources(specialization.compile(target), target, tmp_path)
        assert registers > 0
        assert spilled == 0, f"{specialization} spills {spilled}"


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_spill_is_seen(
    target: GPUTarget, specializations: list[Specialization], tmp_path: Path
) -> None:
    """The same check where a kernel is given far fewer registers than its tile needs."""
    forward = next(s for s in specializations if s.function.__name__ == "_block_forward_kernel")
    constants = dict(forward.constants) | {"BLOCK_W": 32, "BLOCK_C": 128}
    greedy = forward._replace(constants=tuple(constants.items()))
    few_registers = {"maxnreg": 64} if target.backend == "cuda" else {"waves_per_eu": 8}
    compiled = greedy.compile(target, num_warps=1, **few_registers)
    assert resources(compiled, target, tmp_path).spilled > 0
