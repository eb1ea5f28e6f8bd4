"""Optimizers and schedules by name, and the schedule-free train/eval switch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn

from locallearn import LocalLearner, UserError, build_model
from locallearn.engine import list_optimizers, list_schedules
from locallearn.engine.optimizers import (
    ScheduleFreeAdamW,
    build_schedule,
    check_schedule,
    optimizer_factory,
    set_mode,
)


def test_what_there_is() -> None:
    names = ["adam", "adamw", "schedulefree-adamw", "schedulefree-sgd", "sgd"]
    assert list_optimizers() == names
    assert list_schedules() == ["none", "cosine", "multistep", "plateau"]


def test_default_is_the_papers() -> None:
    learner = LocalLearner(build_model("smallconv"), "lls")
    assert set(learner.optimizers) == {"conv1", "conv2", "conv3", "linear1", ""}
    for optimizer in learner.optimizers.values():
        assert isinstance(optimizer, AdamWScheduleFree)
        group = optimizer.param_groups[0]
        assert group["lr"] == 5e-3
        assert group["betas"] == (0.9, 0.999)
        assert group["weight_decay"] == 0
        assert group["warmup_steps"] == 0


def test_a_function_makes_the_optimizer() -> None:
    made = []

    def factory(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(len(parameters))
        return torch.optim.SGD(parameters, lr=0.1)

    LocalLearner(build_model("smallconv"), "lls-m", optimizer=factory)
    assert made == [4, 4, 4, 4, 2]  # weight, gamma, beta and M of each block; the classifier


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-sgd"])
def test_weights_switch_between_two_points(name: str) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = optimizer_factory(name, lr=0.1, weight_decay=0.0)([weight])
    set_mode([optimizer], training=True)
    for _ in range(5):
        weight.grad = weight.detach().clone()
        optimizer.step()
    y = weight.detach().clone()
    set_mode([optimizer], training=False)
    x = weight.detach().clone()
    z = optimizer.state[weight]["z"]
    assert not torch.equal(x, y)
    torch.testing.assert_close(y, 0.1 * z + 0.9 * x)  # y = (1 - beta) z + beta x
    set_mode([optimizer], training=False)
    assert torch.equal(weight, x)
    set_mode([optimizer], training=True)
    torch.testing.assert_close(weight.detach(), y)


def test_averaging_weights_are_those_of_the_papers_version() -> None:
    """100 steps against the algorithm as the authors of LLS ran it, written out."""
    lr, beta1, beta2, eps = 0.05, 0.9, 0.999, 1e-8
    start = torch.randn(7, dtype=torch.float64)
    target = torch.randn(7, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_factory("schedulefree-adamw", lr=lr, weight_decay=0.0)([weight])
    set_mode([optimizer], training=True)

    y, z, v = start.clone(), start.clone(), torch.zeros(7, dtype=torch.float64)
    x = start.clone()
    weight_sum = 0.0
    for k in range(100):
        weight.grad = weight.detach() - target
        optimizer.step()

        grad = y - target
        v = beta2 * v + (1 - beta2) * grad**2
        correction = 1 - beta2 ** (k + 1)
        z = z - lr * grad / ((v / correction).sqrt() + eps)
        weight_sum += correction
        x = x + correction / weight_sum * (z - x)
        y = (1 - beta1) * z + beta1 * x
        torch.testing.assert_close(weight.detach(), y, rtol=1e-10, atol=1e-12)
        if k % 30 == 29:  # a test in between changes nothing
            set_mode([optimizer], training=False)
            torch.testing.assert_close(weight.detach(), x, rtol=1e-10, atol=1e-12)
            set_mode([optimizer], training=True)
    torch.testing.assert_close(optimizer.state[weight]["z"], z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], v, rtol=1e-10, atol=1e-12)


def test_plain_optimizers_have_one_point() -> None:
    weight = nn.Parameter(torch.ones(2))
    set_mode([torch.optim.SGD([weight], lr=0.1)], training=False)
    assert torch.equal(weight.detach(), torch.ones(2))


def rates(schedule: str, num_epochs: int, losses: list[float] | None = None) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = build_schedule(schedule, optimizer, num_epochs)
    found = []
    for epoch in range(num_epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([losses[epoch]] if losses else []))
    return found


def test_schedules_by_hand() -> None:
    assert rates("none", 3) == [1.0, 1.0, 1.0]
    assert rates("cosine", 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates("multistep", 8) == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    falling_then_flat = [3.0, 2.0] + [2.0] * 8
    assert rates("plateau", 10, falling_then_flat) == pytest.approx([1.0] * 8 + [0.1] * 2)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_schedules_of_few_epochs(epochs: int) -> None:
    assert len(rates("multistep", epochs)) == epochs


def test_schedule_errors() -> None:
    with pytest.raises(UserError, match=r"unknown schedule 'cosin'. Valid: none, cosine"):
        check_schedule("cosin", "adamw")
    with pytest.raises(UserError, match=r"schedulefree-adamw is schedule-free .* Use one of adam,"):
        check_schedule("cosine", "schedulefree-adamw")
    check_schedule("cosine", "adamw")
    check_schedule("none", "schedulefree-adamw")


# -- our schedule-free AdamW --------------------------------------------------------------------


def schedule_free(weights: list[nn.Parameter], **settings) -> ScheduleFreeAdamW:
    optimizer = ScheduleFreeAdamW(weights, lr=0.1, **settings)
    optimizer.train()
    return optimizer


def steps(optimizer, weights, num: int) -> None:
    for _ in range(num):
        for weight in weights:
            weight.grad = weight.detach().sin()
        optimizer.step()


def test_copies_go_on_as_the_original() -> None:
    weight = nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = schedule_free([weight], averages_by_bias_correction=True)
    steps(optimizer, [weight], 3)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (other,) = twin.param_groups[0]["params"]
        original = copy.deepcopy(weight.detach())
        assert torch.equal(other, original)
        steps(twin, [other], 2)
        again = copy.deepcopy(optimizer)
        (third,) = again.param_groups[0]["params"]
        steps(again, [third], 2)
        assert torch.equal(other, third)


def test_a_loaded_state_leaves_the_backend() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = schedule_free([weight])
    optimizer.backend = "compiled"
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.backend == "compiled"


def test_groups_can_be_added_and_rates_changed() -> None:
    one, two = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = schedule_free([one])
    optimizer.add_param_group({"params": [two], "lr": 0.0, "train_mode": True})
    steps(optimizer, [one, two], 2)
    assert torch.equal(two, torch.ones(2, dtype=torch.float64))
    optimizer.param_groups[1]["lr"] = 0.1
    steps(optimizer, [one, two], 1)
    assert not torch.equal(two, torch.ones(2, dtype=torch.float64))


def test_a_parameter_without_gradient_stays() -> None:
    one, two = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = schedule_free([one, two])
    steps(optimizer, [one], 2)
    assert torch.equal(two, torch.ones(2))
    assert two not in optimizer.state or "z" not in optimizer.state[two]


def test_stepping_in_evaluation_mode_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = ScheduleFreeAdamW([weight], lr=0.1)
    with pytest.raises(RuntimeError, match=r"training mode to step: call train\(\)"):
        optimizer.step()


@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is not ours
def test_a_change_of_memory_format_takes_the_state_along(needs_compiler: None) -> None:
    """And a parameter that is a slice of a tensor, which no kernel goes through in order."""
    moved = []
    for backend in ("reference", "compiled"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
        part = nn.Parameter(torch.randn(4, 8, dtype=torch.float64)[:, :5])
        optimizer = schedule_free([weight, part])
        optimizer.backend = backend
        steps(optimizer, [weight, part], 2)
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        steps(optimizer, [weight, part], 2)
        only = schedule_free([weight])
        only.backend = backend
        steps(only, [weight], 2)
        moved.append(torch.cat([weight.detach().flatten(), part.detach().flatten()]))
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-12)
