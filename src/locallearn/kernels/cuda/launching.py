"""Launches of kernels on the current stream."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locallearn.errors import UserError
from locallearn.kernels.cuda.compilation import Program, compiled

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode

Size = tuple[int, ...]
Argument = Tensor | int | float | None | ctypes.Structure | ctypes.c_double
# As a kernel takes it.
Value = ctypes.c_void_p | ctypes.c_int | ctypes.c_float | ctypes.Structure | ctypes.c_double

# What the driver answers where it and the code do not go together.
_DRIVER_FAULTS = (
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
)

MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


def launch(
    program: Program,
    name: str,
    grid: Size,
    block: Size,
    *arguments: Argument,
    num_shared_bytes: int = 0,
) -> None:
    """Start a kernel.

    Arguments:
        program: what it is compiled from.
        name: of the kernel in it.
        grid: blocks; where there are none, nothing is started.
        block: threads of a block.
        arguments: in the kernel's order. A tensor stands for where it begins, None for a null
            pointer, an int for a C int and a float for a C float.
        num_shared_bytes: what a block shares beside its own declarations.
    """
    if 0 in grid:
        return
    assert all(size <= limit for size, limit in zip(grid, MAX_GRID, strict=False))
    run(program, name, grid, block, [_value(a) for a in arguments], num_shared_bytes)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins, as a field of a structure takes it."""
    return None if tensor is None else tensor.data_ptr()


def _value(argument: Argument) -> Value:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(address(argument))
    if isinstance(argument, int):
        assert -(2**31) <= argument < 2**31
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument


def run(
    program: Program,
    name: str,
    grid: Size,
    block: Size,
    values: list[Value],
    num_shared_bytes: int,
) -> None:
    """Start a kernel on the current device's current stream."""
    from cuda.bindings import driver

    kernel = _kernel(program, name, torch.cuda.current_device())
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    (status,) = driver.cuLaunchKernel(
        driver.CUfunction(int(kernel.handle)),
        *(*grid, 1, 1)[:3],
        *(*block, 1, 1)[:3],
        num_shared_bytes,
        driver.CUstream(torch.cuda.current_stream().cuda_stream),
        ctypes.addressof(addresses),
        0,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the kernel {name} of {program} was not started: {status.name}")


@functools.cache
def _kernel(program: Program, name: str, device: int) -> Kernel:
    """Raises:
    UserError: the driver can't load what was compiled, or what :func:`compiled` raises.
    torch.OutOfMemoryError: there is no room for the code.
    """
    code = _loaded(program, torch.cuda.get_device_capability(device))
    try:
        return code.get_kernel(name)  # which loads it, the first time
    except Exception as error:  # whose class has no public name
        said = str(error).partition("\n")[0]
        if "CUDA_ERROR_OUT_OF_MEMORY" in said:
            raise torch.OutOfMemoryError(f"loading the kernel {name}: {said}") from error
        # Others may be of an earlier kernel, or of a name that is not there: bugs.
        if not any(fault in said for fault in _DRIVER_FAULTS):
            raise
        raise UserError(
            f"the CUDA driver can't load the compiled kernels ({said}): it may be older than the "
            f"NVRTC that is installed. Use --backend triton."
        ) from error


@functools.cache
def _loaded(program: Program, capability: tuple[int, int]) -> ObjectCode:
    """Kept: a kernel lives as long as the code that it is in."""
    return compiled(program, "sm_{}{}".format(*capability))
