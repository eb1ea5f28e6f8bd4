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

BACKENDS = ("auto", "autograd", "reference", "compiled", "triton")

# What has kernels of its own. "autograd" stands for none: autograd inside each block, and the
# definition of what else is to be computed.
_KERNELS = {"autograd": "reference", "reference": "reference"}


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def missing_for(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """What a backend lacks on a device, as the end of a sentence; None where it can run."""
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "compiled":
        if device_type == "cpu" and cxx_compiler() is None:
            return "needs a C++ compiler (g++ or clang++), and none is on the PATH"
        if device_type == "cuda" and not has_triton:
            return "needs the package triton, which is not installed"
        if device_type not in ("cpu", "cuda"):
            return f"has not been tried on {device_type}"
    if backend == "triton":
        if device_type != "cuda":
            return f"needs a CUDA device, and this is {device_type}"
        if not has_triton:
            return "needs the package triton, which is not installed"
        if dtype != torch.float32:
            return f"takes float32 parameters, and the model's are {str(dtype).split('.')[1]}"
    return None


def choose_backend(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that is meant, "auto" made definite: the fastest that can run.

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
        fast = "triton" if device_type == "cuda" else "compiled"
        return "autograd" if missing_for(fast, device_type, dtype) else fast
    if missing := missing_for(backend, device_type, dtype):
        raise UserError(f"backend {backend!r} {missing}. Use backend auto or autograd.")
    return backend


@functools.cache
def load_kernels(backend: str) -> Kernels:
    """The ops of a backend that is known to run, by its definite name."""
    assert backend in BACKENDS
    assert backend != "auto"
    name = _KERNELS.get(backend, backend)
    return cast(Kernels, importlib.import_module(f"locallearn.kernels.{name}"))
