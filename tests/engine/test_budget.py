"""What a step needs in memory, and what is chosen to fit."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model
from locallearn.data import InputSpec
from locallearn.engine import TrainConfig
from locallearn.engine.blocks import NetworkPlan, freeze, plan_blocks
from locallearn.engine.blocks import frozen_runs as frozen_runs_module
from locallearn.engine.budget import (
    MakeLearner,
    choose,
    compare,
    format_memory,
    learner_maker,
    measure_inference,
    measure_recalibration,
    measure_step,
    parse_memory,
)
from locallearn.engine.budget.needs import batch_of, step_timeline
from locallearn.engine.budget.probing import LocalProbe
from locallearn.engine.measuring import Mark, memory_timeline
from locallearn.rules import parse_rule

# The package names the function of the same name.
schedulefree_module = importlib.import_module("locallearn.kernels.reference.schedulefree_step")
K = 4
SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
MIB = 2**20

pytestmark = pytest.mark.usefixtures("one_thread")


def smallconv() -> nn.Module:
    return build_model("smallconv", num_classes=K, in_channels=3, image_size=32, width=0.25)


def resnet() -> nn.Module:
    return tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=K)


def maker(model: Any, optimizer: str | None = None) -> MakeLearner:
    def make(rule: str, trained_blocks: str) -> LocalLearner:
        return LocalLearner(
            model(),
            parse_rule(rule),
            num_classes=K,
            example_input=torch.randn(2, *SHAPE),
            trained_blocks=trained_blocks,
            optimizer=optimizer,
            backend="autograd",
            recalibration_batches=0,
        )

    return make


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("256MiB", 256 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("64mib", 64 * 2**20),
        ("2KiB", 2048),
        ("3kB", 3000),
        ("7 B", 7),
        ("1GiB", 2**30),
        ("10MB", 10_000_000),
    ],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "256", "MiB", "-1MiB", "1 TiBs", "1,5GB", "0.1B", "0MiB"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(UserError, match=r"as 256MiB"):
        parse_memory(text)


def test_amounts_as_text() -> None:
    assert format_memory(32_715_571) == "31.2 MiB"
    assert format_memory(3 * 2**29) == "1.50 GiB"


def test_timeline_of_known_tensors() -> None:
    def call(mark: Mark) -> None:
        first = torch.empty(1000)
        mark("second")
        second = torch.empty(500)
        del first
        mark("third")
        del second

    timeline = memory_timeline(call)
    assert timeline.segments == (
        ("", (0, 4000)),
        ("second", (4000, 6000, 2000)),
        ("third", (2000, 0)),
    )
    assert timeline.peak_bytes == 6000


def test_every_moment_is_extended() -> None:
    """The highest is reached elsewhere in the larger call."""

    def call(num: int, mark: Mark) -> None:
        fixed = torch.empty(100)
        del fixed
        growing = torch.empty(10 * num)
        del growing

    first, second, large = (memory_timeline(functools.partial(call, n)) for n in (2, 3, 20))
    assert first.peak_bytes == second.peak_bytes == 400
    assert first.extended(second, 18).segments == large.segments
    assert large.peak_bytes == 800


def test_parts_of_a_step_by_hand() -> None:
    """A linear layer under sgd with momentum: one state and one gradient for each weight."""

    def make() -> LocalLearner:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, K))
        return LocalLearner(
            model, "bp", num_classes=K, optimizer="sgd", backend="autograd", recalibration_batches=0
        )

    images, labels = batch_of(SHAPE, 5, K, CPU)
    step = measure_step(make, images, labels)
    weights = 4 * (3072 * K + K)
    assert (step.batch_size, step.state_bytes, step.gradient_bytes) == (5, weights, weights)
    # The images, channels-last, the copy that flattening makes of them, and what the logits take.
    assert 8 * images.numel() < step.activation_bytes < 8 * images.numel() + 2000
    assert step.to_json()["peak_bytes"] == step.peak_bytes


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (smallconv, "schedulefree-adamw"),
        (smallconv, "adamw"),
        (smallconv, "sgd"),
        (resnet, "schedulefree-adamw"),
    ],
)
def test_predictions_hold(model: Any, optimizer: str) -> None:
    make = maker(model, optimizer)
    probe = LocalProbe(make, "lls-mxm", SHAPE, K, 10**12, CPU)
    for trained, num_images in (
        ([], 9),
        (probe.names[-1:], 2),
        (probe.names[-2:], 16),
        (probe.names, 12),
    ):
        name = ",".join(trained) or "none"
        build = functools.partial(make, "lls-mxm", name)
        step = measure_step(build, *batch_of(SHAPE, num_images, K, CPU))
        predicted = probe.step_bytes(trained, num_images)
        assert predicted == pytest.approx(step.peak_bytes, rel=0.05), (name, num_images)
        assert probe.state_of(trained) == pytest.approx(step.state_bytes, rel=0.01)


def is_suffix(some: Sequence[str], names: Sequence[str]) -> bool:
    return list(some) == list(names[len(names) - len(some) :])


@pytest.mark.parametrize("rule", ["lls-mxm", "dfa", "bp"])
def test_choices_stay_within_their_limits(rule: str) -> None:
    make = maker(smallconv)
    names = make("lls", "all").block_names
    num_trained = []
    limits = (700_000, 16 * MIB) if rule == "bp" else (700_000, 2 * MIB, 4 * MIB, 16 * MIB)
    for limit in limits if rule != "dfa" else (2 * MIB,):
        choice = choose(make, SHAPE, K, limit, rule=rule, largest_batch=16)
        assert choice.peak_bytes <= limit
        assert is_suffix(choice.trained, names)
        assert [*choice.frozen, *choice.trained] == names
        build = functools.partial(make, rule, choice.trained_blocks)
        images, labels = batch_of(SHAPE, choice.batch_size, K, CPU)
        step = measure_step(build, images, labels)
        # dfa draws its feedback in a learner's first step.
        share = 0.2 if rule == "dfa" else 0.0
        assert step.peak_bytes == pytest.approx(choice.step.peak_bytes, rel=share)
        assert measure_inference(build, images[:1]) <= limit
        assert measure_recalibration(build, images) <= choice.recalibration_bytes
        assert choice.batch_size in (1, 2, 4, 8, 16)
        num_trained.append(len(choice.trained))
    assert num_trained == sorted(num_trained)
    if rule == "dfa":
        return
    assert num_trained[0] < num_trained[-1] == len(names)
    assert (choice.batch_size, choice.trained_blocks) == (16, "all")
    assert choice.to_json()["step"]["batch_size"] == 16


def test_a_larger_batch_or_another_block_would_not_fit() -> None:
    make = maker(smallconv)
    limit = 1_500_000
    choice = choose(make, SHAPE, K, limit, rule="lls-mxm", largest_batch=256)
    assert choice.frozen
    wider = ",".join([choice.frozen[-1], *choice.trained])
    for trained, num_images in ((choice.trained_blocks, 2 * choice.batch_size), (wider, 8)):
        build = functools.partial(make, "lls-mxm", trained)
        step = measure_step(build, *batch_of(SHAPE, num_images, K, CPU))
        assert step.peak_bytes > limit, (trained, num_images)


def test_what_the_user_has_fixed_stays() -> None:
    make = maker(smallconv)
    choice = choose(make, SHAPE, K, 8 * MIB, rule="lls", fixed_blocks="conv2", largest_batch=32)
    assert choice.trained == ("conv2",)
    assert choice.frozen == ("conv1", "conv3", "linear1")
    choice = choose(make, SHAPE, K, 8 * MIB, rule="lls", fixed_batch=6)
    assert choice.batch_size == 6
    with pytest.raises(UserError, match="unknown block to train 'conv9'"):
        choose(make, SHAPE, K, 8 * MIB, rule="lls", fixed_blocks="conv9")
    with pytest.raises(UserError, match=r"a batch of 1 is too small.*at least 2"):
        choose(make, SHAPE, K, 8 * MIB, rule="lls", fixed_blocks="conv2", fixed_batch=1)


@pytest.mark.parametrize(
    ("fixed", "what"),
    [
        ({}, "its output layer with a batch of 1"),
        ({"fixed_blocks": "conv1,conv2"}, "2 of its blocks and its output layer with a batch of 2"),
        ({"fixed_batch": 32}, "its output layer with a batch of 32"),
    ],
)
def test_refusals_tell_what_would_fit(fixed: dict[str, Any], what: str) -> None:
    make = maker(smallconv)
    refused = functools.partial(choose, make, SHAPE, K, rule="lls", what="smallconv", **fixed)
    with pytest.raises(UserError) as raised:
        refused(100_000)
    said = str(raised.value)
    assert "\n" not in said
    assert what in said
    assert "smallconv at 3x32x32" in said
    assert "--memory-limit is 0.1 MiB" in said
    (enough,) = re.findall(r"Give at least (\d+MiB)", said)
    assert refused(parse_memory(enough)).peak_bytes <= parse_memory(enough)
    (least,) = re.findall(r"which takes (\d+\.\d) MiB", said)
    with pytest.raises(UserError, match="the smallest that can learn"):
        refused(int((float(least) - 0.06) * MIB))


@pytest.mark.usefixtures("one_thread")  # each has scratch of its own
@pytest.mark.parametrize("model", [smallconv, resnet])
def test_backpropagations_needs_are_extended_to_what_they_are(model: Any) -> None:
    make = maker(model)
    last = make("lls", "all").block_names[-1]
    compared = compare(make, SHAPE, K, 6 * MIB, batch_size=20, trained_blocks=last)
    for need in (
        compared.same_blocks,
        compared.same_blocks_checkpointed,
        compared.whole,
        compared.whole_checkpointed,
    ):
        learner = make(need.rule, need.trained_blocks)
        measured = step_timeline(learner, *batch_of(SHAPE, 20, K, CPU)).peak_bytes
        assert need.peak_bytes == pytest.approx(measured, rel=0.05), need
        if need.largest_batch:
            learner = make(need.rule, need.trained_blocks)
            images, labels = batch_of(SHAPE, max(2, need.largest_batch), K, CPU)
            measured = step_timeline(learner, images, labels).peak_bytes
            assert measured <= 1.05 * 6 * MIB
    assert compared.whole.trained_blocks == "all"
    assert compared.whole_checkpointed.peak_bytes <= compared.whole.peak_bytes
    assert set(compared.to_json()["same_blocks"]) >= {"peak_bytes", "largest_batch"}


def test_learners_as_a_runs_settings_have_them() -> None:
    settings = TrainConfig(
        rule="local-losses", local_loss="predsim", group_blocks=2, device="cpu", optimizer="sgd"
    ).resolve()
    inputs = InputSpec((32, 32), 3, None, (0.0,) * 3, (1.0,) * 3)
    make = learner_maker(settings, inputs, K, device=CPU)
    ours, bp = make("local-losses", "all"), make("bp:bp_memory=checkpoint", "linear1")
    assert ours.rule.options()["local_loss"] == "predsim"
    assert ours.block_names == ["conv2", "linear1"]
    assert bp.rule.name == "bp"
    assert bp.frozen_names == ["conv1", "conv2", "conv3"]
    assert isinstance(bp.optimizers[""], torch.optim.SGD)


class Mixing(nn.Module):
    """A layer in which images know of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x - x.mean(0, keepdim=True)


class Skipping(nn.Module):
    """Its last block reads what the first makes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4, 4)
        )
        self.output = nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.output(self.last(self.third(self.second(first)) + first).mean((2, 3)))


def frozen_plan(model: nn.Module, blocks: list[str], trained: str) -> NetworkPlan:
    images = torch.randn(3, *SHAPE)
    plan = plan_blocks(model, blocks, inputs=images, num_classes=K)
    return freeze(model, plan, trained, images)


def test_runs_are_what_can_run_in_one_go() -> None:
    def runs(plan: NetworkPlan) -> list[tuple[str, ...]]:
        return [run.names for run in plan.frozen_runs]

    model = Skipping()
    blocks = ["first", "second", "third", "last"]
    # What lies between is read by the skip as well, so it is no run of all three.
    assert runs(frozen_plan(model, blocks, "last")) == []
    assert runs(frozen_plan(model, blocks, "first")) == [("second", "third"), ("last",)]
    model.second.register_forward_hook(lambda module, args, output: None)
    assert runs(frozen_plan(model, blocks, "first")) == [("third",), ("last",)]
    mixing = nn.Sequential(
        nn.Conv2d(3, 4, 3), Mixing(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(28 * 28 * 4, K)
    )
    assert runs(frozen_plan(mixing, ["0", "1", "2"], "2")) == []


@pytest.mark.parametrize("rule", ["lls", "dfa", "bp", "bp:bp_memory=checkpoint"])
def test_slices_change_memory_alone(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6) % K
    results, peaks = [], []
    for slice_bytes in (2**30, 1):
        monkeypatch.setattr(frozen_runs_module, "_SLICE_BYTES", {"cpu": slice_bytes})
        torch.manual_seed(0)
        learner = maker(resnet, "sgd")(rule, "layer3")
        (front, back) = learner.plan.frozen_runs
        assert front.names == ("conv1", "bn1", "relu", "maxpool", "layer1.0", "layer2.0")
        assert back.names[0] == "layer4.0"
        learner.step(images, labels)
        timeline = memory_timeline(lambda mark: learner.step(images, labels))  # noqa: B023
        peaks.append(timeline.peak_bytes)
        results.append(learner(images))
        weights = {k: v.clone() for k, v in learner.model.state_dict().items()}
        results.append(weights["layer3.0.conv1.weight"])
    torch.testing.assert_close(results[0], results[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[1], results[3], rtol=1e-3, atol=1e-5)
    if "bp" in rule:  # whose graph behind the front is what takes most
        assert peaks[1] <= peaks[0]
    else:
        assert peaks[1] < peaks[0]


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (1, 40), (6, 2, 3, 3)])
def test_a_sliced_schedule_free_step_is_the_same(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for size in (2**18, 4):
        monkeypatch.setattr(schedulefree_module, "SLICE_VALUES", size)
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(shape))
        if len(shape) == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        learner = LocalLearner(nn.Linear(2, K), "bp", num_classes=K, weight_decay=0.1)
        optimizer = learner.make_optimizer([parameter])
        optimizer.train()
        for _ in range(3):
            parameter.grad = torch.randn(shape)
            optimizer.step()
        results.append((parameter.detach().clone(), optimizer.state[parameter]["z"]))
    for whole, sliced in zip(*results, strict=True):
        assert torch.equal(whole, sliced)
