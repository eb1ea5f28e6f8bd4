"""Every CUDA kernel compiles for GPUs that are not here, and spills no register.

What is compiled is what the launchers launch for the models and the odd cases, noted instead of
done: see benchmarks/kernel_resources.py. No device is needed, and none is used.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.kernel_resources import (
    ARCHITECTURES,
    Launched,
    Resources,
    compile_for,
    launches_of_models,
    launches_of_odd_cases,
    parse_report,
    programs_of,
)
from tests.kernels.nvrtc import missing

import locallearn.kernels.cuda
from locallearn.kernels.cuda.compilation import Program, source_text

FOLDER = Path(locallearn.kernels.cuda.__file__).parent
SOURCES = sorted(path.name for path in FOLDER.iterdir() if path.name.endswith(".cu"))
_KERNEL = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]+\))?\s+(\w+)\(')
MAX_REGISTERS = 255  # so that 256 threads fit into a multiprocessor's 65,536
_EIGHT_BLOCKS = "__launch_bounds__(kMaxThreads, 8)"
WIDE_ACCESSES = {
    "block_forward": ("LDG", "STG"),
    "block_backward": ("LDG", "STG"),
    "chunk_stats": ("LDG",),
    "norm_backward": ("LDG", "STG"),
    "schedulefree_step": ("LDG", "STG"),
}


@pytest.fixture
def nvrtc() -> None:
    if lacks := missing():
        pytest.skip(lacks)


@pytest.fixture(scope="module")
def of_models() -> list[Launched]:
    return launches_of_models()


@pytest.fixture(scope="module")
def launches(of_models: list[Launched]) -> list[Launched]:
    return list(dict.fromkeys([*of_models, *launches_of_odd_cases()]))


def kernels_of(source: str) -> set[str]:
    return set(_KERNEL.findall(FOLDER.joinpath(source).read_text()))


def test_every_kernel_is_launched(launches: list[Launched]) -> None:
    launched = {(program.source, kernel) for program, kernel in launches}
    assert launched == {(source, kernel) for source in SOURCES for kernel in kernels_of(source)}


def test_what_the_models_launch(of_models: list[Launched]) -> None:
    """In float32 and bfloat16 at full width."""
    found = {
        kernel: {
            (constants["ELEMENT"], int(constants["VECTOR"]))
            for program, other in of_models
            if other == kernel
            for constants in [dict(program.constants)]
        }
        for kernel in ("block_forward", "block_backward", "channel_stats", "norm_backward")
    }
    assert all(of_kernel == {("float", 4), ("bfloat16", 8)} for of_kernel in found.values()), found


def check(found: list[Resources], record_property: Callable[[str, object], None]) -> None:
    assert found
    for kernel in found:
        name = f"{kernel.kernel} {kernel.architecture}"
        record_property(name, f"{kernel.registers} registers, {kernel.shared_bytes} bytes shared")
        assert 0 < kernel.registers <= MAX_REGISTERS, name
        assert kernel.stack_bytes == kernel.spill_bytes == 0, f"{name}: {kernel}"


compile_once = functools.cache(compile_for)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_models_launch_spills_nothing(
    architecture: str,
    of_models: list[Launched],
    record_property: Callable[[str, object], None],
) -> None:
    for program in programs_of(of_models):
        check(compile_once(program, architecture)[1], record_property)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("source", SOURCES)
def test_odd_cases_spill_nothing(
    source: str, launches: list[Launched], record_property: Callable[[str, object], None]
) -> None:
    """Of those that the models don't launch, in float32 and for one architecture.

    The other types and architectures are in the record that the script writes.
    """
    for program in programs_of(launches):
        if program.source == source and dict(program.constants)["ELEMENT"] == "float":
            check(compile_once(program, "sm_90")[1], record_property)


def crowded(text: str) -> str:
    """The same with so many blocks to a multiprocessor that a thread has 32 registers."""
    crowded, count = re.subn(r"__launch_bounds__\(kMaxThreads, \d\)", _EIGHT_BLOCKS, text)
    assert count > 0
    return crowded


@pytest.mark.usefixtures("nvrtc")
def test_a_spill_is_seen(of_models: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.kernel_resources.source_text", lambda name: crowded(source_text(name))
    )
    forward = next(program for program, kernel in of_models if kernel == "block_forward")
    _, (kernel,) = compile_for(forward, "sm_90")
    assert kernel.registers <= 32
    assert kernel.spill_bytes > 0
    assert kernel.stack_bytes > 0


def disassembled(code: bytes, folder: Path) -> str:
    triton = pytest.importorskip("triton", reason="no nvdisasm: the package triton brings it")
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_of(kernel: str, sass: str) -> str:
    """From a kernel's own section to the next."""
    (text,) = re.findall(rf"\.section\s+\.text\.{kernel},(.*?)(?=\.section|\Z)", sass, re.DOTALL)
    return text


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("kernel", WIDE_ACCESSES)
def test_accesses_are_of_16_bytes(kernel: str, of_models: list[Launched], tmp_path: Path) -> None:
    programs = [program for program, other in of_models if other == kernel]
    assert programs
    for program in programs:
        code, _ = compile_once(program, "sm_90")
        text = instructions_of(kernel, disassembled(code, tmp_path))
        for access in WIDE_ACCESSES[kernel]:
            found = re.findall(rf"\b{access}\.E[\w.]*", text)
            assert any("128" in one.split(".") for one in found), f"{program}: {set(found)}"


@pytest.mark.usefixtures("nvrtc")
def test_one_channel_at_a_time_is_no_wide_access(launches: list[Launched], tmp_path: Path) -> None:
    """The same search where there is none to find."""
    program = next(
        program
        for program, kernel in launches
        if kernel == "block_forward" and dict(program.constants)["VECTOR"] == "1"
    )
    code, _ = compile_once(program, "sm_90")
    text = instructions_of("block_forward", disassembled(code, tmp_path))
    assert re.search(r"\bLDG\.E", text)
    assert not re.search(r"\b(LDG|STG)\.E[\w.]*\.128", text)


def compile_with_nvcc(program: Program, file: Path, folder: Path) -> list[Resources]:
    """The file with its includes, as it is."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH; it comes with the CUDA toolkit")
    macros = [f"-D{name}={value}" for name, value in program.constants]
    targets = [
        f"-gencode=arch=compute_{number},code=sm_{number}"
        for number in (architecture.removeprefix("sm_") for architecture in ARCHITECTURES)
    ]
    command = [nvcc, "-fatbin", *targets, "-std=c++17", "-Xptxas", "-v", *macros]
    command += ["-I", str(FOLDER), "-o", str(folder / "kernel.fatbin"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return parse_report(done.stderr)


@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_them_too(
    source: str,
    launches: list[Launched],
    record_property: Callable[[str, object], None],
    tmp_path: Path,
) -> None:
    programs = [program for program in programs_of(launches) if program.source == source]
    widest = max(programs, key=lambda program: int(dict(program.constants)["VECTOR"]))
    found = compile_with_nvcc(widest, FOLDER / source, tmp_path)
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES)
    assert {kernel.kernel for kernel in found} == kernels_of(source)
    check(found, record_property)


def test_nvcc_shows_a_spill(of_models: list[Launched], tmp_path: Path) -> None:
    forward = next(program for program, kernel in of_models if kernel == "block_forward")
    file = tmp_path / "block_forward.cu"
    file.write_text(crowded((FOLDER / "block_forward.cu").read_text()))
    found = compile_with_nvcc(forward, file, tmp_path)
    assert len(found) == len(ARCHITECTURES)
    assert all(kernel.spill_bytes > 0 for kernel in found)
