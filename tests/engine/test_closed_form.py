"""The closed form as the engine's path: which blocks take it, and the same training as without."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model, build_rule
from locallearn.analysis import step_cost
from locallearn.data import load_dataset
from locallearn.engine import TrainConfig
from locallearn.engine.backend_choice import choose_run_backend, count_normalized
from locallearn.engine.blocks import recognize
from locallearn.engine.learner import COMPILE_AFTER
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.models import Block, BlockNetwork, ConvBlock, DepthwiseSeparableBlock, LinearBlock
from locallearn.rules import Rule

NUM_STEPS = 100

pytestmark = pytest.mark.filterwarnings("default")  # what torch's compiler warns of is not ours


def problem(num: int = 32, size: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images whose mean says something of the class, so that there is something to learn."""
    labels = torch.randint(classes, (num,))
    return torch.randn(num, 3, size, size) + labels[:, None, None, None] / 2, labels


def network() -> nn.Module:
    """One block of each kind, small: float64 convolutions are slow."""
    return nn.Sequential(
        ConvBlock(3, 6, latent_size=2, max_pool=2),
        DepthwiseSeparableBlock(6, 6, latent_size=2),
        nn.Flatten(),
        LinearBlock(6 * 9, 16, latent_size=8),
        nn.Linear(16, 4),
    )


@functools.cache
def trajectory(backend: str, dtype: torch.dtype, rule: str | Rule) -> Tensor:
    """(steps, 1 + blocks): the losses of a training, the same for every backend but for rounding.

    Plain SGD, whose steps are as small as the gradients: Adam's first steps are as large as the
    learning rate whatever the gradient is, and turn rounding into a difference at once.
    """
    torch.manual_seed(5)
    batches = [problem(16, size=7) for _ in range(10)]
    learner = LocalLearner(
        network(),
        rule,
        num_classes=4,
        backend=backend,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ).to(dtype)  # made in float32: the same numbers are drawn for either
    rows = []
    for number in range(NUM_STEPS):
        images, labels = batches[number % len(batches)]
        result = learner.step(images.to(dtype), labels)
        rows.append(torch.stack([result.loss, *result.block_losses.values()]))
    return torch.stack(rows).double()


@pytest.mark.parametrize(
    "rule",
    ["lls", "lls-m", "lls-mxm", build_rule("lls-s", similarity=0.3), "local-losses"],
    ids=lambda rule: rule if isinstance(rule, str) else rule.name,
)
def test_many_steps_in_float64_are_those_of_autograd(rule: str | Rule) -> None:
    expected = trajectory("autograd", torch.float64, rule)
    assert expected[-10:].mean() < 0.9 * expected[:10].mean(), "nothing was learned"
    actual = trajectory("reference", torch.float64, rule)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def test_many_steps_in_float64_compiled(needs_compiler: None, two_threads: None) -> None:
    expected = trajectory("reference", torch.float64, "lls-mxm")
    actual = trajectory("compiled", torch.float64, "lls-mxm")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_many_steps_in_float32_stray_no_further_than_autograds(
    backend: str, request: pytest.FixtureRequest, two_threads: None
) -> None:
    """From the float64 trajectory, at most twice as far as plain PyTorch's own float32."""
    if backend == "compiled":
        request.getfixturevalue("needs_compiler")
    exact = trajectory("autograd", torch.float64, "lls-mxm")
    plain = (trajectory("autograd", torch.float32, "lls-mxm") - exact).abs()
    ours = (trajectory(backend, torch.float32, "lls-mxm") - exact).abs()
    assert ours.mean() <= 2 * plain.mean() + 1e-6
    assert ours.max() <= 2 * plain.max() + 1e-5


def test_every_block_of_the_package_takes_it() -> None:
    for name in ("smallconv", "vgg8", "mobilenet-v1"):
        learner = LocalLearner(build_model(name), "lls", backend="reference")
        assert set(learner.block_paths.values()) == {"closed form"}
        plain = LocalLearner(build_model(name), "lls", backend="autograd")
        assert set(plain.block_paths.values()) == {"generic"}


def no_affine(block: ConvBlock) -> None:
    block.norm = nn.BatchNorm2d(4, affine=False)


def endless_average(block: ConvBlock) -> None:
    block.norm.momentum = None


def biased(block: ConvBlock) -> None:
    block.conv = nn.Conv2d(3, 4, 3, padding=1)


def circular(block: ConvBlock) -> None:
    block.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False)


def hooked(block: ConvBlock) -> None:
    block.conv.register_forward_hook(lambda module, inputs, output: output * 2)


def parametrized(block: ConvBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.conv)


def gelu(block: ConvBlock) -> None:
    block.nonlinearity = nn.GELU()


def overlapping_pool(block: ConvBlock) -> None:
    block.pool = nn.MaxPool2d(3, stride=2)


def identity(block: ConvBlock) -> None:
    block.nonlinearity = nn.Identity()


def relu_for_a_pool(block: ConvBlock) -> None:
    block.pool = nn.ReLU()


def no_norm(block: ConvBlock) -> None:
    block.norm = nn.Identity()


def square_pool(block: ConvBlock) -> None:
    block.pool = nn.MaxPool2d((2, 2))


def patched(block: ConvBlock) -> None:
    activation = block.activation
    block.activation = lambda x: activation(x) * 2


def patched_part(block: ConvBlock) -> None:
    forward = block.conv.forward
    block.conv.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize(
    "change",
    [
        relu_for_a_pool,
        no_norm,
        square_pool,
        patched,
        patched_part,
        no_affine,
        endless_average,
        circular,
        hooked,
        parametrized,
        gelu,
        overlapping_pool,
    ],
    ids=lambda change: change.__name__,
)
def test_a_changed_block_takes_the_generic_path(change) -> None:
    """Else the change would be passed over. Its gradients are then autograd's own."""
    block = ConvBlock(3, 4, latent_size=2, max_pool=2)
    assert recognize(block) is not None
    change(block)
    assert recognize(block) is None
    model = nn.Sequential(block, nn.Flatten(), nn.LazyLinear(4))
    images, labels = problem(8)
    model(images)
    learner = LocalLearner(model, "lls", num_classes=4, backend="reference")
    assert learner.block_paths == {"0": "generic"}
    learner.step(images, labels)


@pytest.mark.parametrize("change", [identity, biased], ids=lambda change: change.__name__)
def test_a_changed_block_that_the_closed_form_still_covers(change) -> None:
    """Without an activation, or with a bias that the norm subtracts again: equal to autograd."""
    moved = []
    for backend in ("autograd", "reference"):
        torch.manual_seed(3)
        block = ConvBlock(3, 4, latent_size=2, max_pool=2)
        change(block)
        model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 4 * 4, 4)).double()
        learner = LocalLearner(
            model,
            "lls",
            num_classes=4,
            backend=backend,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
        for _ in range(3):
            learner.step(images, torch.arange(8) % 4)
        moved.append(torch.cat([t.flatten().double() for t in model.state_dict().values()]))
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-11)
    assert learner.block_paths == {"0": "closed form"}


def test_a_subclass_takes_the_generic_path() -> None:
    class Doubled(ConvBlock):
        def activation(self, x: Tensor) -> Tensor:
            return super().activation(x) * 2

    assert recognize(Doubled(3, 4, latent_size=2)) is None


@pytest.mark.parametrize("backend", ["autograd", "reference"])
def test_a_frozen_batch_norm_normalises_by_its_running_statistics(backend: str) -> None:
    moved = []
    for path in ("autograd", backend):
        torch.manual_seed(4)
        model = build_model("smallconv", num_classes=4).double()
        learner = LocalLearner(
            model, "lls", backend=path, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
        )
        for _ in range(2):  # the first step puts everything in training mode
            model.conv1.norm.eval()
            learner.training = True
            learner.step(problem(8)[0].double(), torch.arange(8) % 4)
        assert model.conv1.norm.num_batches_tracked == 0
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["autograd", "reference"])
def test_one_value_for_each_channel_is_refused(backend: str) -> None:
    model = nn.Sequential(nn.Flatten(), LinearBlock(12, 8, latent_size=8), nn.Linear(8, 4))
    learner = LocalLearner(model, "lls", num_classes=4, backend=backend, batch_statistics_from=1)
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value|no variance; a batch of"):
        learner.step(torch.randn(1, 3, 2, 2), torch.tensor([1]))


def test_statistics_that_are_not_tracked_are_not_updated() -> None:
    block = ConvBlock(3, 4, latent_size=2)
    block.norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 64, 4))
    learner = LocalLearner(model, "lls", num_classes=4, backend="reference")
    assert learner.block_paths == {"0": "closed form"}
    learner.step(*problem(8))


def test_relu_is_slope_zero() -> None:
    torch.manual_seed(2)
    model = build_model("smallconv", num_classes=4).double()
    for block in model.modules():
        if isinstance(block, Block):
            block.nonlinearity = nn.ReLU()
    images, labels = problem(8)
    moved = []
    for backend in ("autograd", "reference"):
        twin = copy.deepcopy(model)
        learner = LocalLearner(
            twin, "lls", backend=backend, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
        )
        learner.step(images.double(), labels)
        moved.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    torch.testing.assert_close(*moved, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", ["smallconv", "vgg8", "mobilenet-v1"])
def test_running_statistics_are_batch_norms(model: str) -> None:
    torch.manual_seed(2)
    network = build_model(model, num_classes=4).double()
    images, labels = problem(4, size=32)
    states = []
    for backend in ("autograd", "reference"):
        twin = copy.deepcopy(network)
        LocalLearner(twin, "lls", backend=backend).step(images.double(), labels)
        states.append({k: v for k, v in twin.state_dict().items() if "running" in k or "num_" in k})
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-12)


def test_peak_memory_is_the_largest_blocks_own_tensors(
    needs_compiler: None, two_threads: None
) -> None:
    """Input, z and output of the second block, 15 % for all else; and what `cost` counts."""
    blocks = [ConvBlock(c, 16, latent_size=2, max_pool=p) for c, p in ((3, 1), (16, 2))]
    model = BlockNetwork(blocks, pool_size=1, num_classes=4)
    learner = LocalLearner(model, "lls-mxm", backend="compiled", recalibration_batches=0)
    images, labels = problem(32, size=32)
    images = images.contiguous(memory_format=torch.channels_last)
    learner.step(images, labels)
    peak = peak_memory_bytes(lambda: learner.step(images, labels))
    z = 4 * 32 * 16 * 32 * 32
    own = z + z + z // 4  # of the second block, whose output is pooled
    first = z + z  # of the first, whose input is the images
    assert max(own, first) <= peak <= 1.15 * max(own, first)
    cost = step_cost(model, learner.rule, image_shape=(3, 32, 32), batch_size=32)
    assert peak == pytest.approx(cost.peak_activation_bytes, rel=0.05)


# -- which backend ------------------------------------------------------------------------------


def test_auto_goes_over_to_the_fast_backend_when_that_pays(monkeypatch) -> None:
    """By the work done, so that a run repeats, and resumes, exactly."""
    monkeypatch.setattr("locallearn.engine.learner.choose_backend", lambda *args: "compiled")
    learner = LocalLearner(build_model("smallconv", num_classes=4), "lls")
    assert learner.backend == "autograd"
    used = []
    monkeypatch.setattr(learner, "_use_backend", used.append)
    images, labels = problem(8)
    learner.step(images, labels)
    values = learner.training_state()["num_elements"]
    assert values == 8 * (32 * 64 + 64 * 16 + 128 * 4 + 512)
    learner._num_elements = 4 * COMPILE_AFTER - values
    learner.step(images, labels)
    assert used == []
    learner.step(images, labels)
    assert used == ["compiled"]


def test_a_state_brings_its_backend_along(monkeypatch) -> None:
    """Before and after the change alike: training goes on exactly as it would have."""
    monkeypatch.setattr(
        "locallearn.engine.learner.choose_backend",
        lambda backend, *args: "compiled" if backend == "auto" else backend,
    )
    monkeypatch.setattr("locallearn.engine.learner.missing_for", lambda *args: None)
    early = LocalLearner(build_model("smallconv"), "lls")
    before = copy.deepcopy(early.training_state())
    early._num_elements = 10 * COMPILE_AFTER
    early._consider_compiling()
    assert early.backend == "compiled"
    after = copy.deepcopy(early.training_state())
    other = LocalLearner(build_model("smallconv"), "lls")
    other.load_training_state(after)
    assert other.backend == "compiled"
    other.load_training_state(before)
    assert other.backend == "autograd"
    other._num_elements = 10 * COMPILE_AFTER
    other._consider_compiling()
    assert other.backend == "compiled"


def test_how_a_run_chooses_its_backend(monkeypatch) -> None:
    data = load_dataset("digits")
    monkeypatch.setattr("locallearn.engine.backend_choice.choose_backend", lambda *args: "compiled")

    def chosen(**settings) -> tuple[str, str]:
        return choose_run_backend(TrainConfig(device="cpu", **settings).resolve(), data)

    assert chosen(epochs=1)[0] == "autograd"
    assert "too short" in chosen(epochs=1)[1]
    assert chosen(epochs=10_000) == (
        "compiled",
        "auto: the run is long enough for compiling to pay",
    )
    assert chosen(epochs=10_000, rule="bp")[0] == "autograd"
    assert chosen(epochs=1, backend="compiled") == ("compiled", "as asked")


def test_how_many_values_the_norms_see() -> None:
    """SmallConv at 8x8: 32x8x8, 64x4x4, 128x2x2 and 512."""
    model = build_model("smallconv", in_channels=1)
    assert count_normalized(model, torch.zeros(1, 1, 8, 8)) == (4, 2048 + 1024 + 512 + 512)


def test_backends_that_cannot_run_are_refused(monkeypatch) -> None:
    model = build_model("smallconv")
    with pytest.raises(UserError, match=r"unknown backend 'numpy'. .*Valid: auto, autograd"):
        LocalLearner(model, "lls", backend="numpy")
    if not torch.cuda.is_available():
        for name in ("triton", "cuda"):
            with pytest.raises(UserError, match=rf"'{name}' needs a CUDA device, and this is cpu"):
                LocalLearner(model, "lls", backend=name)
    monkeypatch.setattr("locallearn.kernels.backends.cxx_compiler", lambda: None)
    with pytest.raises(UserError, match=r"'compiled' needs a C\+\+ compiler"):
        LocalLearner(model, "lls", backend="compiled")
    assert LocalLearner(model, "lls").backend == "autograd"


def test_overlapping_updates_need_streams() -> None:
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the model would first have to be moved there")
    with pytest.raises(UserError, match="overlap_updates needs CUDA streams"):
        LocalLearner(build_model("smallconv"), "lls", overlap_updates=True)
