"""Steps that are measured: the same ones each time, alone or beside others."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time

import pytest
import torch

from locallearn.engine.host_transfer import measure_host_transfer_ms_per_mib
from locallearn.engine.measured_steps import MeasuredSteps, steps_beside
from locallearn.errors import UserError

TINY = MeasuredSteps(
    model="smallconv",
    rule="lls",
    batch_size=4,
    image_shape=(3, 8, 8),
    num_classes=3,
    precision="fp32",
    device="cpu",
    backend="autograd",
    num_threads=1,
)


def test_steps_are_the_same_each_time() -> None:
    losses = []
    for _ in range(2):
        images, labels = TINY.batch()
        assert images.shape == (4, 3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        learner = TINY.learner("lls-m")
        losses.append([float(learner.step(images, labels).loss) for _ in range(2)])
        torch.rand(1)
    assert losses[0] == losses[1]


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    TINY.learner("bp")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_others_take_steps_meanwhile() -> None:
    with steps_beside(TINY, 1):
        (other,) = multiprocessing.active_children()
        assert other.is_alive()
        used = _cpu_ticks(other.pid)
        deadline = time.monotonic() + 30
        while _cpu_ticks(other.pid) < used + 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _cpu_ticks(other.pid) >= used + 5
    assert not other.is_alive()


def _cpu_ticks(pid: int | None) -> int:
    """Of user and system time, by Linux's /proc/PID/stat."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_others_that_can_not() -> None:
    with (
        pytest.raises(UserError, match=r"ended before its first steps\. Leave out --beside"),
        steps_beside(dataclasses.replace(TINY, rule="lls-x"), 1),
    ):
        pass
    assert not multiprocessing.active_children()


def test_sending_takes_time() -> None:
    assert 0 < measure_host_transfer_ms_per_mib() < 1000
