"""Which backends there are, which can run where, and which `auto` means."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from typing import cast

import torch

from locallearn.errors import UserError, unknown_name
from locallearn.kernels.interface import Kernels

BACKENDS = ("auto", "autograd", "reference", "compiled", "triton", "cuda")

# Kernels of their own for CUDA devices, the first choice first.
GPU_BACKENDS = ("triton", "cuda")

# What has kernels of its own. "autograd" stands for none: autograd inside each block, and the
# definition of what else is to be computed.
_KERNELS = {"autograd": "reference", "reference": "reference"}

# What `cuda` imports, by the name of the distribution that brings it.
_CUDA_PACKAGES = {"cuda-core": "cuda.core", "cuda-bindings": "cuda.bindings"}
# The oldest compute capability that its kernels are written for.
_LEAST_CAPABILITY = (8, 0)


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def c_compiler() -> str | None:
    """The C compiler that Triton would build its launcher with, or None."""
    if (name := os.environ.get("CC")) is not None:  # then it tries no other
        return shutil.which(name)
    return shutil.which("gcc") or shutil.which("clang")


def missing_for(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """What a backend lacks on a device, as the end of a sentence; None where it can run."""
    if backend == "compiled":
        if device_type == "cpu" and cxx_compiler() is None:
            return "needs a C++ compiler (g++ or clang++), and none is on the PATH"
        if device_type == "cuda" and (missing := _missing_for_triton()):
            return missing
        if device_type not in ("cpu", "cuda"):
            return f"has not been tried on {device_type}"
    if backend in GPU_BACKENDS:
        if device_type != "cuda":
            return f"needs a CUDA device, and this is {device_type}"
        if backend == "triton" and (missing := _missing_for_triton()):
            return missing
        if backend == "cuda" and (missing := _missing_for_cuda()):
            return missing
        if dtype != torch.float32:
            return f"takes float32 parameters, and the model's are {str(dtype).split('.')[1]}"
    return None


def _missing_for_triton() -> str | None:
    if not _is_installed("triton"):
        return "needs the package triton, which is not installed"
    if c_compiler() is None:
        return "needs a C compiler (gcc or clang, or what CC names), and none is on the PATH"
    return None


def _missing_for_cuda() -> str | None:
    for package, module in _CUDA_PACKAGES.items():
        if not _is_installed(module):
            return (
                f"needs the package {package}, which is not installed "
                f"(pip install 'locallearn[cuda]')"
            )
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _LEAST_CAPABILITY:
            least, own = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, capability))
            return f"needs compute capability {least} or newer, and the device has {own}"
    return None


def _is_installed(module: str) -> bool:
    """Whether a module could be imported, without doing so."""
    parent, _, _ = module.rpartition(".")
    # Looking for a submodule imports its parent, and raises where there is none.
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(module) is not None


def choose_backend(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that is meant, "auto" made definite.

    On CUDA "auto" is the first of GPU_BACKENDS that can run; which of them is the faster, a run
    measures (`engine.backend_choice`). On the CPU it is compiled, where that can run.

    Arguments:
        backend: one of BACKENDS.
        device_type: "cpu", "cuda" or "mps".
        dtype: of the parameters.

    Raises:
        UserError: an unknown name, or a backend that was asked for and can't run there.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if backend == "auto":
        # The definition is no rival: it takes twice as long as autograd on the CPU.
        fast = GPU_BACKENDS if device_type == "cuda" else ("compiled",)
        able = (name for name in fast if missing_for(name, device_type, dtype) is None)
        return next(able, "autograd")
    if missing := missing_for(backend, device_type, dtype):
        raise UserError(f"backend {backend!r} {missing}. Use backend auto or autograd.")
    return backend


def fastest_candidates(device_type: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """What "auto" may come to mean on a device once it is measured; none off CUDA."""
    names = GPU_BACKENDS if device_type == "cuda" else ()
    return [name for name in names if missing_for(name, device_type, dtype) is None]


@functools.cache
def load_kernels(backend: str) -> Kernels:
    """The ops of a backend that is known to run, by its definite name."""
    assert backend in BACKENDS
    assert backend != "auto"
    name = _KERNELS.get(backend, backend)
    return cast(Kernels, importlib.import_module(f"locallearn.kernels.{name}"))
