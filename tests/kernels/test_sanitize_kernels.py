"""What benchmarks/sanitize_kernels.py has its tools run; the tools themselves need a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.sanitize_kernels import sanitize
from tests.kernels import test_device_kernels
from tests.kernels.guarded_memory import GuardedMemory

ROOT = Path(__file__).parents[2]


def ran(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str]]:
    """The command that the tool gets, and its environment."""
    calls: list[Any] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append((command, options["env"]))
        return SimpleNamespace(stdout="ERROR SUMMARY: 3 errors", stderr="", returncode=1)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        found = sanitize("a-sanitizer", "initcheck", "cuda")
    assert (found["num_found"], found["tests_passed"]) == (3, False)
    return calls[0]


def test_the_tests_that_run_under_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one backend, and of them all but what needs the allocator that is off."""
    command, _ = ran(monkeypatch)
    assert command[:3] == ["a-sanitizer", "--tool", "initcheck"]
    collect = [*command[command.index(sys.executable) :], "--collect-only"]
    done = subprocess.run(collect, capture_output=True, text=True, check=True, cwd=ROOT)
    tests = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert all("cuda" in test for test in tests)
    defined = {name for name in vars(test_device_kernels) if name.startswith("test_")}
    captured = {"test_a_captured_step_equals_an_eager_one"}
    assert captured < defined
    assert {test.partition("[")[0] for test in tests} == defined - captured


def test_a_tool_sees_memory_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = ran(monkeypatch)
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    plain = torch.empty
    for inherited, is_guarded in (({}, True), (environment, False)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", inherited)
            GuardedMemory().install(patch)
            assert (torch.empty is not plain) == is_guarded
