"""Fixtures that several rooms share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn.kernels import cxx_compiler

if "PYTEST_XDIST_WORKER" in os.environ:  # its cores are shared with the other workers
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
NUM_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _as_at_the_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS)  # of its own, a run of an earlier test may have set one


@pytest.fixture
def one_thread() -> None:
    """For networks so small that a second thread costs more than it saves."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> None:
    """For torch.compile: what it compiles for one thread has no parallel loops."""
    torch.set_num_threads(2)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a table are forked from a process that has imported what they need.

    As they are begun in earnest, each imports it for itself, which takes 5 s of computing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["locallearn.recipes.worker", "torch._dynamo"])
    jobs_own = SimpleNamespace(get_context=lambda method: context)
    monkeypatch.setattr("locallearn.recipes.jobs.multiprocessing", jobs_own)


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    """Skips, saying so, where the compiled backend can't be used on the CPU."""
    if cxx_compiler() is None:
        pytest.skip("no C++ compiler on this machine: torch.compile can't be used on its CPU")


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory of class folders with noisy images whose mean colour tells the class."""

    def make(
        name: str = "data",
        *,
        classes: tuple[str, ...] = ("apple", "pear", "plum"),
        parts: tuple[str, ...] = ("train", "test"),
        per_class: int = 8,
        sizes: tuple[tuple[int, int], ...] = ((12, 12),),
        mode: str = "RGB",
        suffix: str = ".png",
    ) -> Path:
        rng = np.random.default_rng(0)
        for part in parts:
            for label, class_name in enumerate(classes):
                folder = tmp_path / name / part / class_name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    height, width = sizes[i % len(sizes)]
                    shape = (height, width) if mode == "L" else (height, width, 3)
                    level = 40 + 160 * label / max(1, len(classes) - 1)
                    pixels = np.clip(rng.normal(level, 20, shape), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03d}{suffix}")
        return tmp_path / name

    return make
