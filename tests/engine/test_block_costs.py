"""What each block costs, by a clock that only the blocks move; and that measuring leaves no trace.

Shapes: N batch, F features.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from locallearn.engine import LocalLearner, block_costs
from locallearn.engine.block_costs import (
    BlockCost,
    measure_backprop_costs,
    measure_block_costs,
)
from locallearn.errors import UserError
from locallearn.models import build_model
from locallearn.rules import parse_rule

F, K, N = 4, 3, 8


class Clock:
    """Stands still but for what moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(block_costs, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


class Taking(torch.autograd.Function):
    """The identity, which takes so many ms forward and so many backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward_ms: float, backward_ms: float) -> Tensor:
        ctx.clock, ctx.backward_ms = clock, backward_ms
        clock.seconds += forward_ms / 1000
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.clock.seconds += ctx.backward_ms / 1000
        return grads[0], None, None, None


class Slow(nn.Module):
    """A linear layer that takes so long."""

    def __init__(self, clock: Clock, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.linear = nn.Linear(F, F)
        self._times = (clock, forward_ms, backward_ms)

    def forward(self, x: Tensor) -> Tensor:
        # Before the layer, so that bp's way back to the layer's parameters leads past it.
        return self.linear(Taking.apply(x.requires_grad_(), *self._times)).relu()


class Network(nn.Module):
    """Named the other way round than it runs, with glue of 1 ms in front of each block."""

    def __init__(self, clock: Clock, *, repeats: bool = False) -> None:
        super().__init__()
        self.clock, self.repeats = clock, repeats
        self.output = nn.Linear(F, K)
        self.second = Slow(clock, 7, 50)
        self.first = Slow(clock, 2, 30)

    def glue(self, x: Tensor) -> Tensor:
        self.clock.seconds += 0.001
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.glue(x))
        x = self.second(self.glue(x))
        if self.repeats:
            x = self.second(x)
        return self.output(self.glue(x))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, F, generator=generator)
    return x, torch.randint(K, (N,), generator=generator)


PARAM_BYTES = 4 * (F * F + F)


def test_costs_are_those_of_the_blocks(clock: Clock) -> None:
    x, y = batch()
    learner = LocalLearner(
        Network(clock), "lls", num_classes=K, blocks=["first", "second"], example_input=x
    )
    costs = measure_block_costs(learner, x, y, repeats=3)
    # Of the first block: glue 1, forward 2, backward 30, and the glue in front of the second 1.
    wanted = [
        BlockCost("first", 34, 4, 4 * N * F, PARAM_BYTES),
        BlockCost("second", 57, 7, 4 * N * F, PARAM_BYTES),
        BlockCost("", 1, 1, 4 * N * F, 4 * (F * K + K)),
    ]
    assert [cost.name for cost in costs] == ["first", "second", ""]
    for cost, expected in zip(costs, wanted, strict=True):
        assert cost.step_ms == pytest.approx(expected.step_ms)
        assert cost.forward_ms == pytest.approx(expected.forward_ms)
        assert cost.input_bytes == expected.input_bytes
        assert cost.num_param_bytes == expected.num_param_bytes


def test_costs_of_backprop(clock: Clock) -> None:
    x, y = batch()
    learner = LocalLearner(Network(clock), "bp", num_classes=K, optimizer="sgd")
    optimizer = learner.optimizers[""]

    def take_long(*args: Any) -> None:
        clock.seconds += 0.055

    optimizer.register_step_post_hook(take_long)
    costs = measure_backprop_costs(learner, x, y, blocks=["first", "second"], repeats=3)
    assert [cost.name for cost in costs] == ["first", "second", ""]
    for cost, (forward, backward, num_params) in zip(
        costs, [(4, 30, 20), (7, 50, 20), (1, 0, 15)], strict=True
    ):
        assert cost.forward_ms == pytest.approx(forward)
        assert cost.backward_ms == pytest.approx(backward)
        assert cost.update_ms == pytest.approx(num_params)  # of 55
        assert cost.num_param_bytes == 4 * num_params
        assert cost.step_ms == pytest.approx(forward + backward + num_params)


def test_fewer_are_timed_where_they_take_long(clock: Clock) -> None:
    x, y = batch()
    network = Network(clock)
    learner = LocalLearner(network, "lls", num_classes=K, blocks=["first"], example_input=x)
    calls = []
    network.first.register_forward_hook(lambda *args: calls.append(1))
    measure_block_costs(learner, x, y, repeats=100, limit_seconds=0.0)
    assert len(calls) == 2 * (2 + 3)  # steps and inferences, warm-up and timed


def assert_same(*learners: LocalLearner) -> None:
    """To the bit."""
    states = [tree_leaves(learner.training_state()) for learner in learners]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


MODELS = [
    ("mobilenet-v1", {"width": 0.05}, "lls-m", (3, 32, 33)),
    ("smallconv", {"dropout": 0.2}, "lls-mxm", (3, 10, 10)),  # random numbers, BatchNorm
    ("smallconv", {}, "local-losses", (3, 11, 9)),
]


@pytest.mark.parametrize(("name", "options", "rule", "shape"), MODELS)
def test_measuring_leaves_no_trace(
    name: str, options: dict[str, Any], rule: str, shape: tuple[int, int, int]
) -> None:
    def learner() -> LocalLearner:
        torch.manual_seed(0)
        model = build_model(
            name, num_classes=K, in_channels=shape[0], image_size=shape[1:], **options
        )
        return LocalLearner(model, rule, recalibration_batches=2)

    measured, plain = learner(), learner()
    x = [torch.randn(N, *shape) for _ in range(3)]
    y = torch.randint(K, (N,))
    for number, images in enumerate(x):
        random = torch.get_rng_state()
        measured.step(images, y)
        if number < 2:  # once on fresh optimizers' states, once on such as have something
            mode, before = measured.training, torch.get_rng_state()
            costs = measure_block_costs(measured, images, y, repeats=1)
            assert measured.training == mode
            assert torch.equal(torch.get_rng_state(), before)
            assert {cost.name for cost in costs} == {*measured.block_names, ""}
            assert all(cost.step_ms > 0 for cost in costs)
        torch.set_rng_state(random)
        plain.step(images, y)
    assert_same(measured, plain)
    logits = []
    for each in (measured, plain):
        torch.manual_seed(1)  # statistics are re-estimated, of the batches held on to
        logits.append(each(x[0]))
    assert torch.equal(*logits)


def test_of_fresh_learner(clock: Clock) -> None:
    """Measured before its first step, it begins as one that was not."""
    x, y = batch()
    torch.manual_seed(1)
    network = Network(clock)
    learners = [
        LocalLearner(each, "lls", num_classes=K, blocks=["first", "second"], example_input=x)
        for each in (network, copy.deepcopy(network))
    ]
    measure_block_costs(learners[0], x, y, repeats=2)
    for learner in learners:
        learner.step(x, y)
    assert_same(*learners)


def test_rules_without_steps_of_blocks(clock: Clock) -> None:
    x, y = batch()
    for rule in ("bp", "dfa"):
        model = build_model("smallconv", num_classes=K, image_size=8)
        learner = LocalLearner(model, rule)
        with pytest.raises(UserError, match=f"rule '{rule}' needs .* Use a local rule"):
            measure_block_costs(learner, torch.rand(N, 3, 8, 8), y)
    learner = LocalLearner(
        Network(clock), parse_rule("bp:bp_memory=fused-optimizer"), num_classes=K
    )
    with pytest.raises(UserError, match="under rule 'bp' in its plain form"):
        measure_backprop_costs(learner, x, y)


def test_blocks_that_do_not_run_once(clock: Clock) -> None:
    x, y = batch()
    learner = LocalLearner(
        Network(clock, repeats=True),
        "lls",
        num_classes=K,
        blocks=["first", "second"],
        example_input=x,
        allow_reuse=True,
    )
    with pytest.raises(UserError, match="block 'second' runs more than once"):
        measure_block_costs(learner, x, y)
    learner.step(x, y)  # and the learner goes on


def test_halved() -> None:
    assert block_costs.halved(128) == [128, 64, 32, 16, 8, 4, 2]
    assert block_costs.halved(25) == [25, 12, 6, 3]
    assert block_costs.halved(2) == [2]
    assert block_costs.halved(128, 32) == [128, 64, 32]
    assert block_costs.halved(128, 33) == [128, 64]
    assert block_costs.halved(8, 0) == [8, 4, 2]


def test_median_of_rounds() -> None:
    rounds = [[BlockCost("a", ms, 2 * ms, 8, 4), BlockCost("", 1, 1, 2, 3)] for ms in (5, 1, 3)]
    assert block_costs.median_of(rounds) == [BlockCost("a", 3, 6, 8, 4), BlockCost("", 1, 1, 2, 3)]
