"""What the CUDA kernels are compiled from, and the cache on disk of what was compiled.

NVRTC compiles without a device; that it is not asked again is seen from what lies in the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.nvrtc import missing

from locallearn.errors import UserError
from locallearn.kernels.cuda import compilation
from locallearn.kernels.cuda.compilation import Program, compiled, program, source_text

SMALL = program("augment.cu", ELEMENT="float", VECTOR=1, MAX_THREADS=256, BATCH=4)
_AGAIN = """
from locallearn.kernels.cuda.compilation import compiled, program
constants = {"ELEMENT": "float", "VECTOR": 1, "MAX_THREADS": 256, "BATCH": 4}
code = compiled(program("augment.cu", **constants), "sm_90").code
assert code == b"as it lies on disk", code[:20]
"""
# What loads libraries is replaced before bindings have loaded theirs.
_WITHOUT_NVRTC = """
import cuda.pathfinder

def load(name):
    raise cuda.pathfinder.DynamicLibNotFoundError(f"Failure finding {name}.\\nAttempted: none")

cuda.pathfinder.load_nvidia_dynamic_lib = load
from locallearn.errors import UserError
from locallearn.kernels.cuda.compilation import compiled, program
try:
    compiled(program("augment.cu", ELEMENT="float", VECTOR=1), "sm_90")
except UserError as error:
    said = str(error)
expected = "compiled by NVRTC, which can't be loaded (Failure finding nvrtc). It comes with PyTorch"
assert expected in said, said
"""
_IMPORTS_NOTHING = """
import sys
import locallearn
import locallearn.kernels.cuda
from locallearn.kernels import load_kernels
load_kernels("cuda")
assert "cuda.core" not in sys.modules  # PyTorch imports others of cuda
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    if lacks := missing():
        pytest.skip(lacks)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("entries/**/*") if path.is_file())


def in_a_process(text: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", text]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_was_compiled_is_read_from_disk(cache: Path) -> None:
    code = compiled(SMALL, "sm_90").code
    assert code.startswith(b"\x7fELF")
    (entry,) = entries(cache)
    assert entry.read_bytes() == code
    # What is compiled could not be this.
    entry.write_bytes(b"as it lies on disk")
    assert compiled(SMALL, "sm_90").code == b"as it lies on disk"
    in_a_process(_AGAIN, {"XDG_CACHE_HOME": str(cache)})
    assert entries(cache) == [entry]
    assert entry.read_bytes() == b"as it lies on disk"


def test_what_makes_another_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    compiled(SMALL, "sm_90")

    def compile_anew(what: Program = SMALL, architecture: str = "sm_90") -> None:
        before = len(entries(cache))
        for _ in range(2):
            compiled(what, architecture)
            assert len(entries(cache)) == before + 1

    compile_anew(architecture="sm_80")
    compile_anew(program("augment.cu", ELEMENT="bfloat16", VECTOR=1, MAX_THREADS=256, BATCH=4))
    text = source_text("augment.cu")
    changed = text.replace("kWarp = 32", "kWarp = 64")  # of what it includes
    assert changed != text
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "source_text", lambda name: changed)
        compile_anew()
    status, major, minor = nvrtc.nvrtcVersion()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "nvrtcVersion", lambda: (status, major, minor + 1))
        compile_anew()


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    with pytest.raises(UserError, match=r"the cache of compiled kernels can't be used: .*Set XDG"):
        compiled(SMALL, "sm_90")


def test_an_architecture_that_nvrtc_does_not_know(cache: Path) -> None:
    line = r"NVRTC that is installed is too old .* for this device, sm_555\. Use --backend triton"
    with pytest.raises(UserError, match=line):
        compiled(SMALL, "sm_555")
    assert entries(cache) == []


def test_nvrtc_without_its_own_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.core

    class Program:
        def __init__(self, *_: object) -> None: ...

        def compile(self, *_: object, **__: object) -> None:
            raise Exception(
                "7: NVRTC_ERROR_BUILTIN_OPERATION_FAILURE, compilation log:\n\n"
                "nvrtc: error: failed to open libnvrtc-builtins.so.13.2."
            )

    monkeypatch.setattr(cuda.core, "Program", Program)
    with pytest.raises(UserError, match=r"NVRTC, .*, does not find its library .*builtins\. Use"):
        compiled(SMALL, "sm_90")


def test_where_nvrtc_is_not_installed(cache: Path) -> None:
    in_a_process(_WITHOUT_NVRTC, {"XDG_CACHE_HOME": str(cache)})


def test_an_error_of_the_source_is_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc  # noqa: F401

    monkeypatch.setattr(compilation, "source_text", lambda name: "int broken")
    with pytest.raises(Exception, match=r"expected a \";\"|expected a ';'") as raised:
        compiled(SMALL, "sm_90")
    assert not isinstance(raised.value, UserError)  # a bug, which `auto` is not to pass over
    assert entries(cache) == []


def test_importing_compiles_nothing_and_needs_no_package(tmp_path: Path) -> None:
    in_a_process(_IMPORTS_NOTHING, {"XDG_CACHE_HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


ONCE = {"common.cuh": "struct Normalization {", "half.cuh": "struct bfloat16 {"}


def test_each_include_is_expanded_once() -> None:
    folder = Path(compilation.__file__).parent
    for source in sorted(folder.glob("*.cu")):
        text = source_text(source.name)
        assert "#include" not in text
        assert "#pragma once" not in text
        for name, mark in [
            ("common.cuh", "struct Normalization {"),
            ("half.cuh", "struct bfloat16"),
        ]:
            assert mark in (folder / name).read_text()
            assert text.count(mark) == 1, source
        own = source.read_text().partition('#include "common.cuh"\n')[2]
        assert own
        assert text.endswith(own)
    assert "struct bfloat16" not in source_text("augment.cu", without="half.cuh")
