"""The kernels of a device: on it where there is one, and on the CPU where there is none."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tests.kernels import cuda_on_cpu
from tests.kernels.checks import DEVICE
from tests.kernels.guarded_memory import GuardedMemory


@pytest.fixture(scope="session")
def compiled_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cuda_on_cpu has compiled; one folder for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):  # of one of xdist's workers
        folder = folder.parent
    (folder / "cuda_on_cpu").mkdir(exist_ok=True)
    return folder / "cuda_on_cpu"


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedMemory]:
    memory = GuardedMemory()
    memory.install(monkeypatch)
    yield memory
    memory.check()


@pytest.fixture
def triton_kernels(guarded_memory: GuardedMemory) -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    kernels = importlib.import_module("locallearn.kernels.triton")
    if DEVICE == "cuda":
        yield kernels
        return
    from tests.kernels.triton_on_cpu import interpreted

    with interpreted(kernels):
        yield kernels


@pytest.fixture
def emulated_device(compiled_for_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> cuda_on_cpu.Device:
    if missing := cuda_on_cpu.missing():
        pytest.skip(f"no kernel's source can be run on this CPU: {missing}")
    device = cuda_on_cpu.Device(compiled_for_cpu)
    device.install(monkeypatch)
    return device


@pytest.fixture
def cuda_kernels(guarded_memory: GuardedMemory, request: pytest.FixtureRequest) -> ModuleType:
    if DEVICE == "cpu":
        request.getfixturevalue("emulated_device")
    else:
        pytest.importorskip("cuda.core", reason="the package cuda-core is not installed")
    return importlib.import_module("locallearn.kernels.cuda")


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return request.getfixturevalue(f"{request.param}_kernels")
