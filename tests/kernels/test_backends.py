"""Which backends can run where, and what `auto` means."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from locallearn import UserError
from locallearn.kernels import choose_backend, fastest_candidates, missing_for

Hide = Callable[..., None]


@pytest.fixture
def with_packages(monkeypatch: pytest.MonkeyPatch) -> Hide:
    """Every package and compiler is there, apart from the packages that are given; no device is
    asked anything."""

    def only_without(*absent: str) -> None:
        def find_spec(name: str) -> object | None:
            parent = name.rpartition(".")[0]
            if parent and find_spec(parent) is None:  # as the real one
                raise ModuleNotFoundError(name)
            return None if name in absent else object()

        monkeypatch.setattr("locallearn.kernels.backends.importlib.util.find_spec", find_spec)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    has_programs(monkeypatch, "gcc", "g++")
    only_without()
    return only_without


def has_programs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(
        "locallearn.kernels.backends.shutil.which", lambda name: name if name in names else None
    )
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)


def has_capability(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_auto_is_triton_on_cuda_and_cuda_where_there_is_none(with_packages: Hide) -> None:
    assert choose_backend("auto", "cuda") == "triton"
    assert fastest_candidates("cuda") == ["triton", "cuda"]
    with_packages("triton")
    assert choose_backend("auto", "cuda") == "cuda"
    assert fastest_candidates("cuda") == ["cuda"]
    with_packages("triton", "cuda")
    assert choose_backend("auto", "cuda") == "autograd"
    assert fastest_candidates("cuda") == []


def test_what_both_take(with_packages: Hide) -> None:
    for backend in ("triton", "cuda"):
        assert missing_for(backend, "cuda") is None
        assert missing_for(backend, "cpu") == "needs a CUDA device, and this is cpu"
        lacking = missing_for(backend, "cuda", torch.float64)
        assert lacking == "takes float32 parameters, and the model's are float64"
    assert fastest_candidates("cpu") == fastest_candidates("cuda", torch.bfloat16) == []


@pytest.mark.parametrize(
    ("absent", "package"),
    [
        ("cuda", "cuda-core"),  # the namespace that both lie in
        ("cuda.core", "cuda-core"),
        ("cuda.bindings", "cuda-bindings"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_what_brings_it(
    absent: str, package: str, with_packages: Hide
) -> None:
    with_packages(absent)
    line = rf"'cuda' needs the package {package}, .* \(pip install 'locallearn\[cuda\]'\)\. Use"
    with pytest.raises(UserError, match=line):
        choose_backend("cuda", "cuda")


def test_triton_builds_its_launcher_with_a_c_compiler(with_packages: Hide, monkeypatch) -> None:
    line = "needs a C compiler (gcc or clang, or what CC names), and none is on the PATH"
    has_programs(monkeypatch, "g++")  # which Triton does not try
    assert missing_for("triton", "cuda") == missing_for("compiled", "cuda") == line
    assert fastest_candidates("cuda") == ["cuda"]  # NVRTC is a compiler of its own
    assert choose_backend("auto", "cuda") == "cuda"
    with pytest.raises(UserError, match=r"backend 'triton' needs a C compiler"):
        choose_backend("triton", "cuda")
    for name in ("gcc", "clang"):
        has_programs(monkeypatch, name)
        assert missing_for("triton", "cuda") is None
    monkeypatch.setenv("CC", "mycc")  # it tries no other then
    assert missing_for("triton", "cuda") == line
    has_programs(monkeypatch, "mycc")
    monkeypatch.setenv("CC", "mycc")
    assert missing_for("triton", "cuda") is None


def test_nothing_is_imported_to_know_it() -> None:
    before = set(sys.modules)
    missing_for("cuda", "cuda")
    assert {"cuda.core", "cuda.bindings"} & (set(sys.modules) - before) == set()


def test_old_devices_are_refused(with_packages: Hide, monkeypatch) -> None:
    has_capability(monkeypatch, 7, 5)
    line = r"'cuda' needs compute capability 8\.0 or newer, and the device has 7\.5\. Use"
    with pytest.raises(UserError, match=line):
        choose_backend("cuda", "cuda")
    assert fastest_candidates("cuda") == ["triton"]
    for capability in ((8, 0), (9, 0), (10, 3)):
        has_capability(monkeypatch, *capability)
        assert choose_backend("cuda", "cuda") == "cuda"


def test_auto_asks_the_device_nothing_where_triton_is_there(with_packages, monkeypatch) -> None:
    """A context on the device would be opened, even in a process that trains nothing."""

    def asked() -> tuple[int, int]:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    assert choose_backend("auto", "cuda") == "triton"


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match=r"unknown backend 'cudda'\. Did you mean 'cuda'\?.*triton"):
        choose_backend("cudda", "cpu")
