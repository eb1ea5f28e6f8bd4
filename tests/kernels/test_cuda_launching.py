"""What the CUDA driver is handed, by one that only notes it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the package cuda-bindings is not installed")

from cuda.bindings import driver

from locallearn.errors import UserError
from locallearn.kernels.cuda import launching
from locallearn.kernels.cuda.compilation import program


class Pair(ctypes.Structure):
    _fields_ = (("place", ctypes.c_void_p), ("count", ctypes.c_int))


PROGRAM = program("block_forward.cu", ELEMENT="float", VECTOR=4, MAX_POOL=1)
HANDLE, STREAM = 0x1234, 0x5678


class Driver:
    """Stands for the driver's launch."""

    def __init__(self, types: list[type], status: driver.CUresult) -> None:
        self.types = types
        self.status = status
        self.calls: list[tuple[object, ...]] = []

    def launch(self, function, *rest) -> tuple[driver.CUresult]:
        *sizes, num_shared_bytes, stream, addresses, extra = rest
        places = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
        # Read now: they need not outlive the call.
        values = [t.from_address(places[i]) for i, t in enumerate(self.types)]
        read = [(v.place, v.count) if isinstance(v, Pair) else v.value for v in values]
        self.calls.append((int(function), sizes, num_shared_bytes, int(stream), read, extra))
        return (self.status,)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def installed(types: list[type], status: driver.CUresult = driver.CUresult.CUDA_SUCCESS):
        noting = Driver(types, status)
        monkeypatch.setattr(driver, "cuLaunchKernel", noting.launch)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        stream = SimpleNamespace(cuda_stream=STREAM)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(launching, "_kernel", lambda *key: SimpleNamespace(handle=HANDLE))
        return noting

    return installed


def test_arguments_reach_the_driver(install) -> None:
    types = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_double, Pair]
    noted = install(types)
    tensor = torch.zeros(3)
    arguments = (tensor, None, -7, 0.5, ctypes.c_double(1e-300), Pair(tensor.data_ptr(), 9))
    launching.launch(PROGRAM, "name", (5, 2), (32,), *arguments, num_shared_bytes=48)
    expected = [tensor.data_ptr(), None, -7, 0.5, 1e-300, (tensor.data_ptr(), 9)]
    assert noted.calls == [(HANDLE, [5, 2, 1, 32, 1, 1], 48, STREAM, expected, 0)]


def test_nothing_is_launched_over_no_blocks(install) -> None:
    noted = install([])
    launching.launch(PROGRAM, "name", (0, 2), (32,))
    assert noted.calls == []


def test_a_refused_launch_is_no_silence(install) -> None:
    install([], driver.CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"kernel name .* not started: CUDA_ERROR_INVALID_VALUE"):
        launching.launch(PROGRAM, "name", (1,), (32,))


@pytest.mark.parametrize("argument", [2**31, -(2**31) - 1])
def test_an_int_that_does_not_fit_is_seen(install, argument: int) -> None:
    install([ctypes.c_int])
    with pytest.raises(AssertionError):
        launching.launch(PROGRAM, "name", (1,), (32,), argument)


# -- loading --------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Loads a kernel, which the driver refuses with this error."""

    def loaded(error: str) -> None:
        class Code:
            def get_kernel(self, name: str) -> None:
                raise Exception(error)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(launching, "_loaded", lambda *key: Code())
        launching._kernel.__wrapped__(PROGRAM, "name", 0)

    return loaded


def test_code_that_the_driver_does_not_take(load) -> None:
    said = r"can't load the compiled kernels \(CUDA_ERROR_NO_BINARY_FOR_GPU: x\): .* triton\."
    with pytest.raises(UserError, match=said):
        load("CUDA_ERROR_NO_BINARY_FOR_GPU: x\nmore")


def test_no_room_for_the_code(load) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="kernel name: CUDA_ERROR_OUT_OF_M"):
        load("CUDA_ERROR_OUT_OF_MEMORY: full")


@pytest.mark.parametrize("error", ["CUDA_ERROR_NOT_FOUND: x", "CUDA_ERROR_ILLEGAL_ADDRESS: x"])
def test_a_bug_is_not_taken_for_the_machine_s_fault(load, error: str) -> None:
    with pytest.raises(Exception, match=error) as raised:
        load(error)
    assert not isinstance(raised.value, UserError | torch.OutOfMemoryError)
