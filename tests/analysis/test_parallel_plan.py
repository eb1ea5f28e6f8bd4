"""The model of time against cases worked by hand, and where it must go at its limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from locallearn.analysis.figures.parallel_plan import plot_speedups
from locallearn.analysis.parallel_plan import (
    CostTable,
    Link,
    Setup,
    plan_for,
    predict_gpipe,
    predict_local,
    speedup_curves,
)
from locallearn.engine.block_costs import BackpropCost, BlockCost

MB = 10**6
FREE = Link(bandwidth_gb_s=1e12, latency_us=0.0)


def evenly(costs_ms: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """The first stages get one more where it does not come out even."""
    num, more = divmod(len(costs_ms), num_stages)
    return tuple(num + (stage < more) for stage in range(num_stages))


def local_costs(*blocks: tuple[float, float, float]) -> list[BlockCost]:
    """ms of a step, MB of input, MB of parameters; the last is the output layer."""
    names = [*(f"block{n}" for n in range(1, len(blocks))), ""]
    return [
        BlockCost(name, ms, ms / 4, int(read * MB), int(params * MB))
        for name, (ms, read, params) in zip(names, blocks, strict=True)
    ]


def backprop_costs(*blocks: tuple[float, float, float, float]) -> list[BackpropCost]:
    """ms forward, backward and of the update, MB of input."""
    names = [*(f"block{n}" for n in range(1, len(blocks))), ""]
    return [
        BackpropCost(name, forward, backward, update, int(read * MB), 0)
        for name, (forward, backward, update, read) in zip(names, blocks, strict=True)
    ]


def setup(
    local: dict[int, list[BlockCost]],
    backprop: dict[int, list[BackpropCost]] | None = None,
    link: Link = FREE,
    batch_size: int = 8,
) -> Setup:
    if backprop is None:
        blocks = [(cost.step_ms / 3, cost.step_ms / 2, 0.0, 1.0) for cost in local[batch_size]]
        backprop = {size: backprop_costs(*blocks) for size in local}
    return Setup(
        CostTable(local),
        CostTable(backprop),
        batch_size,
        link,
        evenly,
        most_stages=len(next(iter(local.values()))) - 1,
    )


TWO = {
    8: local_costs((30, 1, 2), (18, 4, 1), (2, 1, 0.5)),
    4: local_costs((16, 0.5, 2), (10, 2, 1), (2, 0.5, 0.5)),
}
# 1 MB a ms, and half a ms for each message.
SLOW = Link(bandwidth_gb_s=1.0, latency_us=500.0)


def test_link() -> None:
    assert SLOW.transfer_ms(3 * MB) == pytest.approx(3.5)
    # Over 4: six rounds of a quarter each.
    assert SLOW.ring_ms(4 * MB, 4) == pytest.approx(6 * (1 + 0.5))
    assert SLOW.ring_ms(0, 4) == 0.0
    assert SLOW.ring_ms(4 * MB, 1) == 0.0
    assert Link(1.0, 0.0, host_ms_per_mib=0.25).host_ms(2**21) == pytest.approx(0.5)


def test_one_device() -> None:
    found = predict_local(setup(TWO, link=SLOW), 1, 1)
    assert (found.way, found.step_ms, found.speedup, found.fill_ms) == ("layers:1", 50, 1, 0)
    (stage,) = found.stages
    assert stage.blocks == ("block1", "block2", "")
    assert (stage.sent_bytes, stage.link_ms, stage.host_ms, stage.exposed_ms) == (0, 0, 0, 0)


def test_two_stages() -> None:
    found = predict_local(setup(TWO, link=SLOW), 2, 1)
    first, last = found.stages
    assert (first.compute_ms, last.compute_ms) == (30, 20)
    assert first.link_ms == pytest.approx(4.5)
    assert first.sent_bytes == 4 * MB
    assert last.blocks == ("block2", "")
    assert found.step_ms == 30
    assert found.bound_by == "stage 0"
    # The first batch is through after 30 + 4.5 + 20; from then on one comes every 30.
    assert found.fill_ms == pytest.approx(24.5)
    assert found.speedup == pytest.approx(50 / 30)
    assert found.idle_share == pytest.approx(1 - 50 / 60)


def test_the_link_can_be_the_slowest() -> None:
    found = predict_local(setup(TWO, link=Link(0.1, 0.0)), 2, 1)
    assert found.step_ms == pytest.approx(40)
    assert found.bound_by == "link 0"


def test_sending_takes_time_of_the_host() -> None:
    link = Link(1e12, 0.0, host_ms_per_mib=2**20 / MB)  # 1 ms a MB
    first, last = predict_local(setup(TWO, link=link), 2, 1).stages
    assert first.host_ms == pytest.approx(4)
    assert last.host_ms == pytest.approx(4)
    assert last.busy_ms == pytest.approx(24)
    # Of 3.5 MB each of two replicas passes on as much as there is, and receives as much.
    (stage,) = predict_local(setup(TWO, link=link), 1, 2).stages
    assert stage.host_ms == pytest.approx(7)


def test_two_replicas() -> None:
    found = predict_local(setup(TWO, link=SLOW), 1, 2)
    (stage,) = found.stages
    # block1 is done at 16 and reduced (2 rounds of 1 MB: 3 ms) at 19; block2 at 26, then 2 ms: 28;
    # the output layer at 28, then two rounds of a quarter: 1.5.
    assert stage.compute_ms == 28
    assert stage.exposed_ms == pytest.approx(1.5)
    assert found.step_ms == pytest.approx(29.5)
    assert found.way == "data:2"


def test_reductions_wait_for_one_another() -> None:
    link = Link(bandwidth_gb_s=0.1, latency_us=0.0)  # 10 ms a MB
    (stage,) = predict_local(setup(TWO, link=link), 1, 2).stages
    # 16 + 20 = 36, + 10 = 46, + 5 = 51, of which the first 28 ms are hidden.
    assert stage.exposed_ms == pytest.approx(23)


def test_stages_of_replicas() -> None:
    found = predict_local(setup(TWO, link=SLOW), 2, 2)
    assert found.way == "layers:2,data:2"
    assert found.num_devices == 4
    first, last = found.stages
    assert first.compute_ms == 16
    assert first.link_ms == pytest.approx(2.5)  # of half the batch
    assert first.exposed_ms == pytest.approx(3)  # nothing comes after the stage's only block
    assert first.sent_bytes == 2 * MB + 2 * MB
    # block2 at 10, reduced at 12; the output layer at 12, reduced at 13.5.
    assert last.busy_ms == pytest.approx(13.5)
    assert found.step_ms == pytest.approx(19)


FOUR_EQUAL = local_costs(*[(10, 1, 1)] * 4, (0, 1, 0))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_gpipe_of_equal_stages_has_its_bubble(num_stages: int, num_micro_batches: int) -> None:
    m = num_micro_batches
    # Costs in proportion to the images: 4 blocks of 8 ms forward and 16 backward for 8.
    table = {
        size: backprop_costs(*[(float(size), 2.0 * size, 0.0, 1.0)] * 4, (0.0, 0.0, 0.0, 1.0))
        for size in (1, 2, 4, 8)
    }
    found = predict_gpipe(setup({8: FOUR_EQUAL}, table), num_stages, m)
    bubble = (num_stages - 1) / (m + num_stages - 1)
    assert found.idle_share == pytest.approx(bubble)
    assert found.step_ms == pytest.approx(4 * 24 / num_stages / (1 - bubble))
    assert found.speedup == pytest.approx(num_stages * (1 - bubble))


def test_gpipe_by_hand() -> None:
    """Two unequal stages, two micro-batches, 1 ms of link each way.

    stage 0   F0 0-3, F1 3-6                              B0 13-17, B1 17-21, U 21-22
    stage 1             F0 4-6, F1 7-9, B0 9-12, B1 12-15, U 15-17
    """
    link = Link(bandwidth_gb_s=1.0, latency_us=0.0)
    table = {4: backprop_costs((3, 4, 1, 9), (1, 2, 1.5, 1), (1, 1, 0.5, 9))}
    table[8] = table[4]
    found = predict_gpipe(setup(TWO, table, link), 2, 2)
    assert found.step_ms == pytest.approx(22)
    first, last = found.stages
    assert (first.compute_ms, last.compute_ms) == (2 * 7 + 1, 2 * 5 + 2)
    assert first.link_ms == pytest.approx(2)
    assert (first.sent_bytes, last.sent_bytes) == (2 * MB, 2 * MB)


def test_gpipes_last_update_delays_the_next_step() -> None:
    table = {8: backprop_costs((1, 1, 0, 1), (1, 1, 10, 1), (0, 0, 0, 1))}
    found = predict_gpipe(setup({8: TWO[8]}, table), 2, 1)
    # Stage 0 is done at 4 and begins again, but stage 1 is busy with its update until 13; a step
    # of it is 2 + 10, as stage 0 has its next micro-batch ready by then.
    assert found.step_ms == pytest.approx(12)


def test_without_anything_between_them_devices_add_up() -> None:
    costs = {size: local_costs(*[(size, 1, 1)] * 4, (0.0, 1, 0)) for size in (1, 2, 4, 8)}
    for num_stages, num_replicas in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        found = predict_local(setup(costs), num_stages, num_replicas)
        assert found.speedup == pytest.approx(num_stages * num_replicas, rel=1e-6)


def test_faster_links_never_hurt() -> None:
    bandwidths, latencies = (0.05, 0.5, 5.0, 50.0), (1000.0, 100.0, 0.0)
    for num_stages, num_replicas in ((2, 1), (1, 2), (2, 2)):
        for latency in latencies:
            times = [
                predict_local(setup(TWO, link=Link(b, latency)), num_stages, num_replicas).step_ms
                for b in bandwidths
            ]
            assert times == sorted(times, reverse=True)
        times = [
            predict_local(setup(TWO, link=Link(0.5, each)), num_stages, num_replicas).step_ms
            for each in latencies
        ]
        assert times == sorted(times, reverse=True)
    table = {size: backprop_costs((3, 4, 1, 9), (1, 2, 1.5, 1), (1, 1, 0.5, 9)) for size in (4, 8)}
    for m in (1, 2):
        times = [predict_gpipe(setup(TWO, table, Link(b, 10.0)), 2, m).step_ms for b in bandwidths]
        assert times == sorted(times, reverse=True)


def test_costs_between_measured_sizes() -> None:
    table = CostTable(TWO)
    assert (table.smallest, table.largest) == (4, 8)
    first = table.at(5)[0]
    assert first.step_ms == pytest.approx(16 + 14 / 4)
    assert first.input_bytes == 625_000
    assert first.num_param_bytes == 2 * MB
    assert first.name == "block1"
    assert table.at(8) == TWO[8]


def test_every_factorisation_is_shown() -> None:
    costs = {size: local_costs(*[(size, 1, 1)] * 4, (0.0, 1, 0)) for size in (1, 2, 4, 8)}
    names = {each.way for each in plan_for(setup(costs), 8).local}
    assert names == {"data:8", "layers:2,data:4", "layers:4,data:2"}  # of 4 blocks no 8 stages
    found = plan_for(setup(costs, link=SLOW), 4)
    assert {each.way for each in found.local} == {"layers:4", "data:4", "layers:2,data:2"}
    assert [each.step_ms for each in found.local] == sorted(each.step_ms for each in found.local)
    assert [each.step_ms for each in found.gpipe] == sorted(each.step_ms for each in found.gpipe)
    assert {each.num_micro_batches for each in found.gpipe} == {1, 2, 4, 8}
    assert found.way("data:4") in found.local
    assert found.way("data:8") is None
    # 13 is a prime: more than there are blocks, and than there are images.
    assert plan_for(setup(costs), 13).local == ()
    assert all(each.num_devices == 4 for each in plan_for(setup(costs), 13).gpipe)


def test_curves(tmp_path: Path) -> None:
    costs = {size: local_costs(*[(size, 1, 1)] * 4, (0.0, 1, 0)) for size in (1, 2, 4, 8)}
    curves = speedup_curves(setup(costs, link=SLOW), 12)
    assert {len(values) for values in curves.values()} == {12}
    assert curves["layers"][3:] == [curves["layers"][3]] * 9
    assert None not in curves["data"][:8]
    assert curves["data"][8:] == [None] * 4
    best = [value for value in curves["best"] if value is not None]
    assert best == sorted(best)
    for way in ("layers", "data"):
        for value, other in zip(curves[way], curves["best"], strict=True):
            assert other is not None
            assert value is None or value <= other
    assert all(values[0] == 1 for values in curves.values())
    content = plot_speedups(curves, "a title", "what is assumed", tmp_path / "x.png")
    assert content.startswith(b"\x89PNG")
