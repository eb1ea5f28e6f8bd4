"""Some blocks learn, the others stay as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model, build_rule
from locallearn.engine import TrainConfig
from locallearn.engine.blocks import freeze, plan_blocks
from locallearn.engine.units import GenericUnit
from locallearn.models import ConvBlock

K = 4
N = 8
RULES = ("lls-mxm", "local-losses", "dfa", "bp", "bp:bp_memory=checkpoint")

pytestmark = pytest.mark.usefixtures("one_thread")


def smallconv() -> nn.Module:
    return build_model("smallconv", num_classes=K, in_channels=3, image_size=32, width=0.25)


def resnet() -> nn.Module:
    return tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=K)


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=K)


# Model, two blocks to train, and what the names of the output layer's parameters begin with.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str | tuple[str, ...]]] = {
    "smallconv": (smallconv, "conv2,linear1", "classifier"),
    "resnet": (resnet, "layer2,layer4.0", "fc"),
    "vit": (vit, "encoder.layers.encoder_layer_1,*.*.*_2", ("heads", "encoder.ln")),
}


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 3, 32, 32, generator=generator), torch.arange(N) % K


def learner_of(model: nn.Module, trained: Any, rule: str = "lls-mxm", **more: Any) -> LocalLearner:
    name, _, option = rule.partition(":")
    options = dict([option.split("=")]) if option else {}
    return LocalLearner(
        model,
        build_rule(name, **options),
        num_classes=K,
        example_input=batch()[0],
        trained_blocks=trained,
        optimizer="adamw",
        lr=1e-2,
        recalibration_batches=0,
        **({"backend": "autograd"} | more),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_none", [False, True], ids=["some", "none"])
def test_only_the_chosen_learn(name: str, rule: str, is_none: bool) -> None:
    make, chosen, output = MODELS[name]
    model = make()
    learner = learner_of(model, "none" if is_none else chosen, rule)
    blocks = {block.name: block for block in learner.plan.blocks}
    learning = [block for block in blocks.values() if not block.is_frozen]
    assert len(learning) == (0 if is_none else 2)
    assert learner.frozen_names == [name for name, block in blocks.items() if block.is_frozen]
    names = {id(p): name for name, p in model.named_parameters()}
    held = {names[id(p)] for block in learning for p in block.module.parameters()}
    held |= {name for name in names.values() if name.startswith(output)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == held
    if "bp" not in rule:
        assert learner.block_names == [block.name for block in learning]
        assert len(learner.heads) == len(learning)

    before = copy.deepcopy(model.state_dict())
    still_statistics = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if not module.training
        for buffer, _ in module.named_buffers(recurse=False)
    }
    for _ in range(2):
        learner.step(*batch())
        assert all(p.grad is None for p in learner.parameters())
    after = model.state_dict()
    for key, value in before.items():
        is_still = key in still_statistics if key not in names.values() else key not in held
        assert torch.equal(after[key], value) == is_still, key
    trained = {
        id(p) for o in learner.optimizers.values() for g in o.param_groups for p in g["params"]
    }
    in_heads = {id(p) for p in learner.heads.parameters() if p.requires_grad}
    assert {names[i] for i in trained - in_heads} == held


def noted_gradients(learner: LocalLearner) -> dict[str, Tensor]:
    """Parameter name -> gradient at its update, of the steps that come."""
    gradients: dict[str, Tensor] = {}
    names = {id(p): name for name, p in learner.model.named_parameters()}

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in names:
                    gradients[names[id(p)]] = p.grad.clone()

    for optimizer in learner.optimizers.values():
        optimizer.register_step_pre_hook(hook)
    return gradients


def as_frozen(model: nn.Module, learner: LocalLearner) -> nn.Module:
    """A plain copy of the model before the learner stepped, with the same modes."""
    plain = copy.deepcopy(model)
    for module, other in zip(plain.modules(), learner.model.modules(), strict=True):
        module.training = other.training
    return plain


@pytest.mark.parametrize("rule", ["bp", "bp:bp_memory=checkpoint"])
@pytest.mark.parametrize("name", MODELS)
def test_backpropagation_is_autograds_on_frozen_modules(name: str, rule: str) -> None:
    make, chosen, _ = MODELS[name]
    model = make()
    learner = learner_of(model, chosen, rule)
    plain = as_frozen(model, learner)
    images, labels = batch()
    gradients = noted_gradients(learner)
    learner.step(images, labels)
    nn.functional.cross_entropy(plain(images), labels).backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_block_behind_frozen_ones_learns_from_what_they_yield(name: str) -> None:
    make, chosen, _ = MODELS[name]
    model = make()
    learner = learner_of(model, chosen, "local-losses")
    plain, head = as_frozen(model, learner), copy.deepcopy(learner.heads[0])
    unit = learner._units[0]
    images, labels = batch()
    gradients = noted_gradients(learner)
    learner.step(images, labels)
    block = plain.get_submodule(unit.name)
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    plain(images)
    hidden = GenericUnit(  # the same head on plain autograd's output
        name=unit.name,
        block=block,
        head=head,
        latent_size=unit.latent_size,
        optimizer=None,
        layout=unit._layout,
    )
    activation, _ = hidden.run(N, seen[0])
    _, grad = hidden._signal_of(activation.detach(), labels)
    own = {f"{unit.name}.{key}": p for key, p in block.named_parameters()}
    expected = torch.autograd.grad(activation, list(own.values()), grad)
    for key, gradient in zip(own, expected, strict=True):
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_state_goes_on_exactly(rule: str) -> None:
    learner = learner_of(resnet(), "layer2", rule)
    learner.step(*batch())
    state = copy.deepcopy(learner.training_state())
    torch.manual_seed(5)
    other = learner_of(resnet(), "layer2", rule)
    other.load_training_state(state)
    assert not other.model.layer1[0].training
    for one in (learner, other):
        one.step(*batch(2))
    for key, value in learner.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], value), key


def test_a_copy_runs_its_own_frozen_blocks() -> None:
    learner = learner_of(resnet(), "layer4")
    other = copy.deepcopy(learner)
    with torch.no_grad():
        other.model.conv1.weight.zero_()
    ours, theirs = learner(batch()[0]), other(batch()[0])
    assert not torch.allclose(ours, theirs)
    torch.testing.assert_close(theirs, other.model.eval()(batch()[0]).detach())


@pytest.mark.parametrize("backend", ["reference", "autograd"])
def test_modes_and_statistics_of_frozen_blocks(backend: str) -> None:
    torch.manual_seed(0)
    learner = LocalLearner(
        smallconv(), "lls", example_input=batch()[0], trained_blocks="conv3", backend=backend
    )
    assert learner.block_paths == {"conv3": "generic" if backend == "autograd" else "closed form"}
    still = copy.deepcopy(learner.model.conv1.state_dict())
    learning = learner.model.conv3.state_dict()["norm.running_mean"].clone()
    learner.step(*batch())
    assert not learner.model.conv1.norm.training
    assert learner.model.conv3.norm.training
    learner(batch()[0])  # recalibrates on the batch
    learner.recalibrate([batch(2)[0], batch(3)[0]])
    assert not learner.model.training
    learner.model.train()  # what a user's own loop does
    learner.step(*batch())
    assert not learner.model.conv1.norm.training
    for key, value in learner.model.conv1.state_dict().items():
        assert torch.equal(value, still[key]), key
    assert not torch.equal(learner.model.conv3.norm.running_mean, learning)


@pytest.mark.parametrize("trained", ["all", "conv2"])
def test_recalibration_is_the_mean_over_the_batches(trained: str) -> None:
    """As torch's own, of the norms that learn."""
    learner = learner_of(smallconv(), trained)
    learner.step(*batch())
    learner.eval()
    plain = copy.deepcopy(learner.model)
    images = [batch(seed)[0] for seed in (2, 3, 4)]
    learner.recalibrate(images)
    if trained == "all":
        torch.optim.swa_utils.update_bn(images, plain)
        for key, value in plain.state_dict().items():
            assert torch.equal(learner.model.state_dict()[key], value), key
        return
    z = [plain.conv2.conv(plain.conv1(x)) for x in images]
    mean = torch.stack([each.mean((0, 2, 3)) for each in z]).mean(0)
    torch.testing.assert_close(learner.model.conv2.norm.running_mean, mean)
    assert learner.model.conv2.norm.momentum == 0.1


class Loose(nn.Module):
    """Layers in no block: a norm and a dropout in front of each block, one read by both, a
    weight that both share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = K
        self.stem_norm, self.middle_norm, self.skip_norm = (nn.BatchNorm2d(3) for _ in range(3))
        self.stem_dropout, self.middle_dropout = nn.Dropout(0.5), nn.Dropout(0.5)
        self.first, self.second = ConvBlock(3, 3, latent_size=2), ConvBlock(3, 3, latent_size=2)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.output = nn.Linear(3, K)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip_norm(x)
        x = self.first(self.scale * self.stem_dropout(self.stem_norm(x)) + skip)
        x = self.second(self.scale * self.middle_dropout(self.middle_norm(x)) + skip)
        return self.output(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("trained", "parameters", "modules"),
    [
        (
            "second",
            {"stem_norm", "skip_norm", "first", "scale"},
            {"stem_norm", "stem_dropout", "first"},
        ),
        (
            "first",
            {"middle_norm", "skip_norm", "second", "scale"},
            {"middle_norm", "middle_dropout", "second"},
        ),
        (
            "none",
            {"stem_norm", "middle_norm", "skip_norm", "first", "second", "scale"},
            {
                "stem_norm",
                "stem_dropout",
                "middle_norm",
                "middle_dropout",
                "skip_norm",
                "first",
                "second",
            },
        ),
        ("first,second", set(), set()),
    ],
)
def test_what_lies_in_no_block_goes_with_who_reads_it(
    trained: str, parameters: set[str], modules: set[str]
) -> None:
    model = Loose()
    plan = plan_blocks(model, inputs=batch()[0])
    plan = freeze(model, plan, trained, batch()[0])
    assert {name.partition(".")[0] for name in plan.frozen_parameters} == parameters
    assert {name.partition(".")[0] for name in plan.frozen_modules} == modules
    learner = learner_of(model, trained, "lls")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what no gradient reaches
        learner.step(*batch())
    still = {name for name, module in model.named_modules() if not module.training}
    assert still == set(plan.frozen_modules)


def test_a_weight_that_a_frozen_block_holds_too_is_frozen() -> None:
    model = Loose()
    model.second.conv = model.first.conv
    learner = learner_of(model, "second", "lls")
    before = copy.deepcopy(model.state_dict())
    learner.step(*batch())
    after = model.state_dict()
    assert torch.equal(after["second.conv.weight"], before["second.conv.weight"])
    assert not torch.equal(after["second.norm.weight"], before["second.norm.weight"])


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ("conv9", "unknown block to train 'conv9'. Did you mean 'conv3'.*Valid: conv1, conv2"),
        ("layer*", "unknown block to train"),
        ("type:Linear", "unknown block to train"),
        ("", "trained_blocks is empty"),
        ([3], "trained_blocks holds 3"),
    ],
)
def test_errors_name_the_blocks(trained: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner_of(smallconv(), trained)


def test_groups_learn_whole() -> None:
    learner = learner_of(smallconv(), "conv2", group_blocks=2)
    assert learner.block_names == ["conv2"]
    assert learner.frozen_names == ["conv3", "linear1"]
    learner.step(*batch())
    with pytest.raises(UserError, match="'conv1' learns together with 'conv2'"):
        learner_of(smallconv(), "conv1", group_blocks=2)


def test_choices() -> None:
    for trained, names in (
        (["conv?"], ["conv1", "conv2", "conv3"]),
        (ConvBlock, ["conv1", "conv2", "conv3"]),
        ("type:LinearBlock", ["linear1"]),
        ([], []),
    ):
        assert learner_of(smallconv(), trained).block_names == names


def test_blocks_are_known_from_the_first_batch_alone() -> None:
    learner = LocalLearner(smallconv(), trained_blocks="conv2", backend="autograd")
    assert not learner.is_built
    learner.step(*batch())
    assert learner.frozen_names == ["conv1", "conv3", "linear1"]


def test_rules_and_settings_that_do_not_go_with_it() -> None:
    with pytest.raises(
        UserError, match=r"'pepita' compares two forwards.*leave out trained_blocks"
    ):
        learner_of(smallconv(), "conv1", "pepita")
    with pytest.raises(UserError, match="--rule pepita trains all blocks"):
        TrainConfig(rule="pepita", trained_blocks="none").resolve()
    with pytest.raises(UserError, match="--trained-blocks is empty"):
        TrainConfig(trained_blocks=" ").resolve()
    block = nn.Sequential(nn.Flatten(), nn.Linear(12, K), nn.ReLU())
    model = nn.Sequential(block)
    with pytest.raises(UserError, match="nothing is left to learn"):
        LocalLearner(
            model,
            blocks=["0"],
            num_classes=K,
            trained_blocks="none",
            example_input=torch.randn(2, 3, 2, 2),
        )


def test_a_run_of_an_earlier_version_trains_all() -> None:
    settings = TrainConfig(backend="autograd", device="cpu").resolve().to_json()
    del settings["trained_blocks"]
    assert TrainConfig.from_json(settings).trained_blocks == "all"
