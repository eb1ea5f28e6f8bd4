"""Runs the CUDA kernels' own sources on the CPU, a thread after another; see device.h.

So what they compute is tested where no GPU is: every index, tail, barrier and shuffle. What they
compile to on a device is looked at in test_cuda_compiled.py.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from locallearn.kernels import cxx_compiler
from locallearn.kernels.cuda import launching
from locallearn.kernels.cuda.compilation import Program, source_text
from locallearn.kernels.cuda.launching import Size, Value

_FOLDER = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]+\))?\s+(\w+)\(')
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
_SHARED = re.compile(r"__shared__ (\w+) (\w+)((?:\[[^;]+\])*);")
_KINDS = {
    ctypes.c_void_p: "p",
    ctypes.c_int: "i",
    ctypes.c_float: "f",
    ctypes.c_double: "d",
}
# Hidden: a kernel may be named as a function of the C library, which would be called in its place.
# Fortified, a jump to another stack would be taken for an error.
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-fno-optimize-sibling-calls",
)
_PROBE = """
#include <setjmp.h>
#include <ucontext.h>
_Float16 half;
ucontext_t context;
void make() { getcontext(&context); makecontext(&context, make, 0); _setjmp(*new jmp_buf[1]); }
"""
# What they find is answered in device.h. No more than these: a library would be needed.
_CHECKS = ("-fsanitize=alignment,bounds,shift,signed-integer-overflow",)


@functools.cache
def missing() -> str | None:
    """What this machine lacks, or None."""
    compiler = cxx_compiler()
    if compiler is None:
        return "no C++ compiler on the PATH"
    # GNU C++ has both; Clang on some machines has not.
    return None if _takes(compiler, ()) else f"{compiler} has no _Float16, or no contexts"


@functools.cache
def checks() -> tuple[str, ...]:
    """The flags that have the compiler check what the sources do; none where it has them not."""
    compiler = cxx_compiler()
    return _CHECKS if compiler and _takes(compiler, _CHECKS) else ()


def _takes(compiler: str, flags: Sequence[str]) -> bool:
    # Not the headers themselves: what is wrong in them is to fail, and not to be skipped.
    command = [compiler, *_FLAGS, *flags, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=_PROBE, capture_output=True, text=True, check=False)
    return done.returncode == 0


class Device:
    """Stands for a CUDA device: launches run at once.

    Arguments:
        folder: for what is compiled; may be shared by processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Whether the last block's last thread goes first; None: at every second launch.
        self.is_reversed: bool | None = None
        self.launches: list[tuple[Program, str, Size, Size]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launching, "run", self.run)
        monkeypatch.setattr(launching, "_current_device", lambda: -1)  # the CPU's number

    def run(
        self,
        program: Program,
        name: str,
        grid: Size,
        block: Size,
        values: list[Value],
        num_shared_bytes: int,
    ) -> None:
        self.launches.append((program, name, grid, block))
        is_reversed = self.is_reversed
        if is_reversed is None:
            is_reversed = len(self.launches) % 2 == 0
        library = _library(self.folder, program)
        _check_arguments(library, name, values)
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        function = library[f"run_{name}"]
        function.restype = ctypes.c_char_p
        problem = function(
            addresses, sizes, ctypes.c_size_t(num_shared_bytes), ctypes.c_bool(is_reversed)
        )
        assert problem is None, f"{name}: {problem.decode()}"


def _check_arguments(library: ctypes.CDLL, name: str, values: list[Value]) -> None:
    """What the launcher hands over is what the kernel takes, structures by their size."""
    kinds, sizes = ctypes.create_string_buffer(64), (ctypes.c_int * 64)()
    count = library[f"describe_{name}"](kinds, sizes)
    expected = list(zip(kinds.value[:count].decode(), sizes[:count], strict=True))
    given = [(_KINDS.get(type(v), "s"), ctypes.sizeof(v)) for v in values]
    assert given == expected, name


def _headers() -> str:
    return "".join((_FOLDER / name).read_text() for name in ("device.h", "half.cuh"))


@functools.cache
def _library(folder: Path, program: Program) -> ctypes.CDLL:
    """Compiled once, for all processes that share the folder."""
    source = source_text(program.source, without="half.cuh")
    source = _DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(device::dynamic_shared);", source)
    source = _SHARED.sub(
        r"static \1 \2\3; static const bool \2_is_shared = device::share(&\2, sizeof \2);", source
    )
    kernels = "".join(f"KERNEL({name})\n" for name in _KERNEL.findall(source))
    text = f"{_headers()}\n{source}\n{kernels}"
    macros = [f"-D{name}={value}" for name, value in program.constants]
    key = hashlib.sha256(repr((text, macros, _FLAGS, checks())).encode()).hexdigest()[:24]
    library = folder / f"{key}.so"
    if not library.exists():
        written = folder / f"{key}.{os.getpid()}.so"
        compiler = cxx_compiler()
        assert compiler is not None
        code = written.with_suffix(".o")
        # Linked by itself: with the flags the library would be linked whose part device.h takes.
        for command in (
            [*_FLAGS, *checks(), *macros, "-c", "-x", "c++", "-", "-o", str(code)],
            ["-shared", str(code), "-o", str(written)],
        ):
            done = subprocess.run(
                [compiler, *command], input=text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[:4000]
        code.unlink()
        written.replace(library)
    return ctypes.CDLL(str(library))
