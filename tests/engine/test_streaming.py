"""Steps on one image, or a few: running statistics, recent batches, and memory that stays flat."""

from __future__ import annotations

import copy
import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_rule
from locallearn.engine.pooling import pooled
from locallearn.models import ConvBlock, LinearBlock

pytestmark = pytest.mark.usefixtures("one_thread")

PRIOR = 8  # images that mean 0 and variance 1 count as at the start
ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Two blocks and a classifier; the second one's BatchNorm sees a single value of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBlock(2, 4, latent_size=2, max_pool=2)
        self.linear = LinearBlock(4 * 3 * 3, 6, latent_size=6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.linear(self.conv(images).flatten(1)))


class Foreign(nn.Sequential):
    """Layers with biases, side by side: the learner makes chains of them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(5, 3),
        )


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def batch(num: int = 1, size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 2, size, size), torch.randint(3, (num,))


def build(model: nn.Module | None = None, rule: str = "lls", **settings: Any) -> LocalLearner:
    settings = {"optimizer": "sgd", "lr": 0.01, "backend": "autograd"} | settings
    example = torch.randn(3, 2, 6, 6).to(next((model or Net()).parameters()).dtype)
    return LocalLearner(model or Net(), rule, num_classes=3, example_input=example, **settings)


def norms(learner: LocalLearner) -> list[nn.Module]:
    return [m for m in learner.model.modules() if hasattr(m, "running_mean")]


def state(learner: LocalLearner) -> dict[str, Tensor]:
    """Everything that a step changes."""
    tensors = {**learner.model.state_dict(), **learner.heads.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# -- the policy ---------------------------------------------------------------------------------


class Norm(nn.Module):
    """BatchNorm alone, in front of a linear layer that learns: the norm lies in no block."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.block = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU())
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block(self.norm(x)))


def normed(norm: nn.Module, shape: tuple[int, ...], **settings: Any) -> LocalLearner:
    model = Norm(norm)
    model.eval()(torch.zeros(1, *shape))
    return LocalLearner(
        model,
        "lls",
        num_classes=3,
        blocks=["block"],
        example_input=torch.randn(2, *shape),
        optimizer="sgd",
        lr=1e-9,
        **settings,
    )


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [2, 3], [1, 8, 4, 2], [8, 8]])
@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 3), (5, 1, 1)])
def test_statistics_are_those_of_all_values_seen(shape: tuple[int, ...], sizes: list[int]) -> None:
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    learner = normed(kind(5), shape, batch_statistics_from=100)
    batches = [3 + 2 * torch.randn(size, *shape) for size in sizes]
    for images in batches:
        learner.step(images, torch.zeros(len(images), dtype=torch.int64))

    # Each image's mean and mean square in each channel, after eight of mean 0 and mean square 1.
    flat = torch.cat(batches).flatten(2) if len(shape) > 1 else torch.cat(batches)[..., None]
    num = PRIOR + len(flat)
    mean = flat.mean(2).sum(0) / num
    var = (PRIOR + flat.square().mean(2).sum(0)) / num - mean**2
    (norm,) = norms(learner)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == len(sizes)


@pytest.mark.parametrize("num", [1, 3])
def test_beyond_the_horizon_an_image_counts_as_it_does_in_a_batch_of_128(num: int) -> None:
    norm = nn.BatchNorm1d(5, momentum=0.2)  # a horizon of 128 / 0.2 = 640 images
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)  # somebody's: they count as a full horizon
    learner = normed(norm, (5,), batch_statistics_from=4)
    images = torch.randn(num, 5)
    learner.step(images, torch.zeros(num, dtype=torch.int64))
    a = num / 640
    delta = images.mean(0) - 1
    var = (1 - a) * 4 + a * images.var(0, correction=0) + a * (1 - a) * delta**2
    torch.testing.assert_close(norm.running_mean, 1 + a * delta)
    torch.testing.assert_close(norm.running_var, var)


def test_what_is_normalised_is_normalised_by_them() -> None:
    learner = normed(nn.BatchNorm1d(5), (5,))
    seen: list[Tensor] = []
    learner.model.norm.register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    image = torch.randn(1, 5)
    learner.step(image, torch.zeros(1, dtype=torch.int64))
    mean = image[0] / (PRIOR + 1)
    var = (PRIOR + image[0] ** 2) / (PRIOR + 1) - mean**2
    torch.testing.assert_close(seen[-1][0], (image[0] - mean) / (var + 1e-5).sqrt())


def test_average_without_end() -> None:
    learner = normed(nn.BatchNorm1d(5, momentum=None), (5,))
    images = torch.randn(40, 5)
    labels = torch.zeros(1, dtype=torch.int64)
    learner.step(images[:1], labels)
    (norm,) = norms(learner)
    first = norm.running_mean.clone()
    learner._statistics._counts.fill_(5000)  # more than any horizon has
    for image in images[1:]:
        learner.step(image[None], labels)
    expected = (5000 * first + images[1:].sum(0)) / 5039
    torch.testing.assert_close(norm.running_mean, expected)


@pytest.mark.parametrize("backend", ["autograd", "reference"])
@pytest.mark.parametrize("num", [3, 16])
def test_large_batches_are_as_without_the_policy(num: int, backend: str) -> None:
    learners = []
    for least in (1, 3):
        torch.manual_seed(0)
        learner = build(backend=backend, batch_statistics_from=least)
        for _ in range(3):
            learner.step(*batch(num))
        learners.append(learner)
    assert_same(*map(state, learners))


def test_a_frozen_norm_and_one_without_statistics_stay_as_they_are() -> None:
    model = Foreign()
    model[5] = nn.BatchNorm2d(5, track_running_stats=False)
    learner = build(model, batch_statistics_from=4)
    model[1].eval()
    before = model[1].running_mean.clone()
    learner.step(*batch(2))
    assert torch.equal(model[1].running_mean, before)
    assert not model[1].training
    assert model[5].training


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_an_ordinary_one_between_steps(fails: bool) -> None:
    learner = build(Foreign())
    images, labels = batch()
    learner.step(images, labels)
    if fails:
        with pytest.raises(RuntimeError, match=r"size|shape"):
            learner.step(torch.randn(1, 2, 9, 9), labels)
    for module in learner.model.modules():
        assert "forward" not in vars(module)
        assert not [name for name in vars(module) if "observer" in name]
        assert module.training


def test_statistics_loaded_by_others_are_not_forgotten() -> None:
    trained = build()
    for _ in range(5):
        trained.step(*batch(16))
    learner = build()
    learner.model.load_state_dict(trained.model.state_dict())
    before = [norm.running_mean.clone() for norm in norms(learner)]
    learner.step(*batch())
    for norm, mean in zip(norms(learner), before, strict=True):
        assert (norm.running_mean - mean).norm() < 0.05 * mean.norm()


def test_always_by_the_batch_if_asked_for() -> None:
    learner = build(backend="reference", batch_statistics_from=1)
    with pytest.raises(UserError, match="BatchNorm has one value for each channel"):
        learner.step(*batch())
    with pytest.raises(UserError, match="batch_statistics_from must be at least 1"):
        build(batch_statistics_from=0)


# -- gradients ----------------------------------------------------------------------------------


def moved(learner: LocalLearner, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each parameter moved by in one step of plain SGD at rate one, negated."""
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.step(images, labels)
    return {name: before[name] - p.detach() for name, p in learner.named_parameters()}


def normalise(z: Tensor, norm: nn.Module) -> Tensor:
    """By the statistics after the first batch, as constants."""
    num, axes = len(z), [0, *range(2, z.ndim)]
    with torch.no_grad():
        mean = z.sum(axes) / (z[0, 0].numel() * (PRIOR + num))
        square = (PRIOR + z.square().sum(axes) / z[0, 0].numel()) / (PRIOR + num)
        rstd = 1 / (square - mean**2 + norm.eps).sqrt()
    shape = [1, -1, *[1] * (z.ndim - 2)]
    scale, shift = norm.weight * rstd, norm.bias - norm.weight * rstd * mean
    return z * scale.view(shape) + shift.view(shape)


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("backend", ["autograd", "reference"])
@pytest.mark.parametrize("rule", ["lls", "lls-mxm"])
def test_gradients_match_float64_autograd(rule: str, backend: str, num: int) -> None:
    model = Net().double()
    nn.init.normal_(model.conv.norm.weight)
    nn.init.normal_(model.linear.norm.bias)
    twin = copy.deepcopy(model)
    learner = build(model, rule, optimizer=sgd, lr=None, backend=backend, batch_statistics_from=8)
    heads = copy.deepcopy(learner.heads)
    images, labels = batch(num)
    images = images.double()

    h1 = F.leaky_relu(normalise(twin.conv.conv(images), twin.conv.norm), 0.01)
    x2 = F.max_pool2d(h1.detach(), 2).flatten(1)
    h2 = F.leaky_relu(normalise(twin.linear.linear(x2), twin.linear.norm), 0.01)
    for h, head in zip((h1, h2), heads, strict=True):
        p = F.adaptive_avg_pool2d(h, 2).flatten(1) if h.ndim == 4 else h
        signal = head.signal(p.detach(), labels)
        p.backward(signal.grad)
    F.cross_entropy(twin.classifier(h2.detach()), labels).backward()
    expected = {f"model.{name}": p.grad for name, p in twin.named_parameters()}
    expected |= {f"heads.{name}": p.grad for name, p in heads.named_parameters()}

    actual = moved(learner, images, labels)
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        torch.testing.assert_close(actual[name], e, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("num", [1, 3])
def test_closed_form_of_layers_with_biases(num: int) -> None:
    learners = {
        backend: build(
            copy.deepcopy(FOREIGN), optimizer=sgd, lr=None, backend=backend, batch_statistics_from=8
        )
        for backend in ("autograd", "reference")
    }
    assert set(learners["reference"].block_paths.values()) == {"closed form"}
    images, labels = batch(num)
    found = {name: moved(each, images.double(), labels) for name, each in learners.items()}
    assert found["autograd"]["model.0.bias"].norm() > 1e-6
    for name, expected in found["autograd"].items():
        torch.testing.assert_close(found["reference"][name], expected, rtol=1e-9, atol=1e-12)
    for one, two in zip(*map(norms, learners.values()), strict=True):
        torch.testing.assert_close(one.running_mean, two.running_mean)
        torch.testing.assert_close(one.running_var, two.running_var)


FOREIGN = Foreign().double()


def test_a_block_that_is_a_norm_and_one_in_a_group() -> None:
    for settings in ({"blocks": ["0", "1", "4"]}, {"group_blocks": 2}):
        learner = build(Foreign(), **settings)
        for _ in range(3):
            learner.step(*batch())
        for norm in norms(learner):
            assert norm.num_batches_tracked == 3
            assert norm.running_mean.norm() > 0


def test_a_layer_that_runs_twice_in_a_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
            self.classifier = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.block(self.block(x)))

    model = Twice()
    buffer = model.block[1].running_mean
    learner = LocalLearner(model, "bp", num_classes=3, optimizer="sgd", lr=0.0001)
    x = torch.randn(1, 6)
    seen: list[Tensor] = []
    handle = model.block[0].register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    learner.step(x, torch.tensor([1]))
    handle.remove()
    assert model.block[1].running_mean is buffer
    torch.testing.assert_close(buffer, torch.cat(seen).sum(0) / (PRIOR + 2))


# -- every rule, a resume, inference ------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        "lls",
        "lls-m",
        "lls-s",
        "local-losses:local_loss=predsim",
        "dfa",
        "drtp",
        "pepita",
        "bp",
        "bp:bp_memory=checkpoint",
        "bp:bp_memory=fused-optimizer",
    ],
)
def test_every_rule_takes_one_image(rule: str) -> None:
    name, _, option = rule.partition(":")
    options = dict([option.split("=")]) if option else {}
    learner = build(rule=build_rule(name, **options))
    before = state(learner)
    for _ in range(3):
        result = learner.step(*batch())
        assert torch.isfinite(result.loss)
    after = state(learner)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    for changing in ("conv.conv.weight", "conv.norm.running_mean", "classifier.weight"):
        assert not torch.equal(before[changing], after[changing])
    assert after["conv.norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("memory", ["checkpoint", "fused-optimizer"])
def test_saving_backpropagations_are_the_plain_one(memory: str) -> None:
    learners = []
    for option in ("plain", memory):
        torch.manual_seed(0)
        learner = build(rule=build_rule("bp", bp_memory=option) if option != "plain" else "bp")
        for _ in range(3):
            learner.step(*batch())
        learners.append(learner)
    one, two = map(state, learners)
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "schedulefree-adamw"])
@pytest.mark.parametrize("infers", [False, True])
def test_a_resume_is_exact(optimizer: str, infers: bool) -> None:
    stream = [batch() for _ in range(12)]
    straight = build(optimizer=optimizer)
    for images, labels in stream[:6]:
        straight.step(images, labels)
    if infers:
        straight.eval()
    buffer = io.BytesIO()
    torch.save(straight.training_state(), buffer)
    buffer.seek(0)
    resumed = build(optimizer=optimizer)
    resumed.step(*batch())  # which the state replaces
    resumed.load_training_state(torch.load(buffer, weights_only=True))
    for learner in (straight, resumed):
        for images, labels in stream[6:]:
            learner.step(images, labels)
    assert_same(state(straight), state(resumed))


def test_local_step_is_the_step() -> None:
    learners = []
    for steps in (False, True):
        torch.manual_seed(0)
        learner = build()
        for _ in range(3):
            images, labels = batch()
            if steps:
                learner.step(images, labels)
                continue
            with learner.local_step(labels):
                F.cross_entropy(learner.model(images), labels).backward()
            learner.optimizers[""].step()
            learner.optimizers[""].zero_grad()
        learners.append(learner)
    assert_same(*map(state, learners))


def test_switching_between_the_two_points_does_not_drift() -> None:
    learner = build(optimizer="schedulefree-adamw")
    for _ in range(20):
        learner.step(*batch())
    before = state(learner)
    for _ in range(2000):
        learner.eval()
        learner.train()
    for name, tensor in state(learner).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


# -- inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 64, [32, 32]),
        ([1] * 33, [32]),
        ([1] * 40, [32, 8]),
        ([16, 5], [16, 5]),
        ([1, 16, 1, 1, 1, 1], [16, 4]),
        ([1], [1]),
        ([], []),
    ],
)
def test_small_batches_are_put_together(sizes: list[int], expected: list[int]) -> None:
    batches = [{"x": torch.full((size, 2), float(n))} for n, size in enumerate(sizes)]
    out = list(pooled(batches, least=4 if 16 in sizes else 2))
    assert [len(each["x"]) for each in out] == expected


def test_images_of_other_sizes_are_not_put_together() -> None:
    batches = [torch.zeros(1, size) for size in (2, 2, 3, 3, 3)]
    assert [tuple(each.shape) for each in pooled(batches, least=2)] == [(2, 2), (3, 3)]


def test_inference_in_a_stream_is_by_the_running_statistics() -> None:
    learner = build(optimizer="schedulefree-adamw", lr=0.01)
    for _ in range(20):
        learner.step(*batch())
    before = state(learner)
    learner(batch(4)[0])
    for name, tensor in state(learner).items():
        if "running" in name:
            assert torch.equal(tensor, before[name])
    learner.step(*batch(16))
    learner(batch(4)[0])  # of a large one they are measured anew
    z = learner.model.conv.conv(learner._recent[-1])
    torch.testing.assert_close(learner.model.conv.norm.running_mean, z.mean((0, 2, 3)))


def test_small_batches_to_recalibrate_on_are_put_together() -> None:
    learner = build()
    learner.step(*batch())
    images = torch.randn(64, 2, 6, 6)
    learner.recalibrate(images.split(1))
    z = learner.model.conv.conv(images)
    norm = learner.model.conv.norm
    torch.testing.assert_close(norm.running_mean, z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, z.var((0, 2, 3)), rtol=0.05, atol=0)


# -- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["sgd, autograd", "schedulefree-adamw, local_step"])
def test_memory_is_flat(side: str) -> None:
    soak = runpy.run_path(str(ROOT / "benchmarks" / "soak.py"))["soak"]
    record = soak(side, 1200, 300)
    held = {name: record[name] for name in ("tensor_kib", "num_tensors")}
    assert all(len(set(values[1:])) == 1 for values in held.values()), held
    objects = record["num_objects"]
    assert max(objects[1:]) - min(objects[1:]) < 50, objects


def test_the_code_of_the_guide_runs() -> None:
    text = (ROOT / "docs" / "streaming.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["num_right"] > 10  # of one label alone


def test_a_small_last_batch_leaves_the_others_to_be_re_estimated_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    learner = build(optimizer="schedulefree-adamw")
    monkeypatch.setattr(
        LocalLearner,
        "recalibrate",
        lambda self, batches: seen.extend(len(images) for images in batches),
    )
    learner.step(*batch(16))
    learner.step(*batch(2))
    learner(batch(4)[0])
    assert seen == [16]
