"""What `LocalLearner` promises of any model, held over families of torchvision and timm.

Small images, and of the larger families a small member, built by the family's own class: what is
tried here is how modules are wired, and not how many there are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision.models as tv
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock

from locallearn import LocalLearner
from locallearn.engine.measuring import peak_memory_bytes

K = 4
N = 8
LR = 3e-4

pytestmark = pytest.mark.usefixtures("one_thread")

# Name -> model, and height and width of its images.
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: tv.ResNet(BasicBlock, [2, 1, 1, 1], num_classes=K), 32),
    "squeezenet": (lambda: tv.squeezenet1_1(num_classes=K), 64),
    "densenet": (
        lambda: tv.DenseNet(
            growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2, num_classes=K
        ),
        32,
    ),
    "googlenet": (lambda: tv.googlenet(num_classes=K, aux_logits=False, init_weights=False), 64),
    "mobilenet-v2": (lambda: tv.mobilenet_v2(num_classes=K, width_mult=0.35), 64),
    "mobilenet-v3": (lambda: tv.mobilenet_v3_small(num_classes=K, width_mult=0.5), 64),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=K), 64),
    "mnasnet": (lambda: tv.mnasnet0_5(num_classes=K), 64),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=K, stochastic_depth_prob=0.0), 64),
    "regnet": (lambda: tv.regnet_y_400mf(num_classes=K), 32),
    "convnext": (
        lambda: tv.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=K),
        32,
    ),
    "swin": (
        lambda: tv.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=K
        ),
        32,
    ),
    "vit": (lambda: tv.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=K), 32),
    "maxvit": (
        lambda: tv.MaxVit(
            (64, 64), 16, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=K
        ),
        64,
    ),
}
TIMM: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm-resnet": (lambda: timm.create_model("resnet10t", num_classes=K), 32),
    "timm-convnext": (
        lambda: timm.create_model("convnext_atto", num_classes=K, depths=(1, 1, 2, 1)),
        64,
    ),
    "timm-vit": (
        lambda: VisionTransformer(32, 8, num_classes=K, embed_dim=32, depth=3, num_heads=2),
        32,
    ),
    "timm-mixer": (
        lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=3, embed_dim=32, num_classes=K),
        32,
    ),
    "timm-poolformer": (lambda: timm.create_model("poolformer_s12", num_classes=K), 64),
    "timm-mobilenet-v3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=K), 64),
    "timm-regnet": (lambda: timm.create_model("regnetx_002", num_classes=K), 32),
    "timm-mobilevit": (lambda: timm.create_model("mobilevit_xxs", num_classes=K), 64),
    "timm-edgenext": (lambda: timm.create_model("edgenext_xx_small", num_classes=K), 64),
    "timm-ghostnet": (lambda: timm.create_model("ghostnet_050", num_classes=K), 64),
}
MODELS = TORCHVISION | TIMM


def build(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    return make(), size


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Noise about one picture for each class."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(K, 3, size, size, generator=generator)
    labels = torch.arange(N) % K
    return pictures[labels] + 0.3 * torch.randn(N, 3, size, size, generator=generator), labels


def learner_of(model: nn.Module, rule: str, images: Tensor) -> LocalLearner:
    """Steps so small that the loss follows its gradient, whatever the model's curvature: Adam's
    first ones are of full length. What is asked for is the direction."""
    return LocalLearner(
        model,
        rule,
        num_classes=K,
        example_input=images,
        optimizer="adamw",
        lr=LR,
        backend="autograd",
        recalibration_batches=0,
    )


@pytest.mark.parametrize("name", MODELS)
def test_contract(name: str) -> None:
    model, size = build(name)
    images, labels = batch(size)
    plain = copy.deepcopy(model).eval()
    learner = learner_of(model, "lls", images)

    assert list(learner.model.state_dict()) == list(plain.state_dict())
    assert len(learner.block_names) > 2
    with torch.no_grad():
        torch.testing.assert_close(learner(images), plain(images), rtol=1e-4, atol=1e-5)

    seen = gradients_at_updates(learner)
    first = learner.step(images, labels)
    for block, (with_gradient, own) in seen.items():
        assert with_gradient, block
        assert with_gradient <= own, f"{block} reaches {with_gradient - own}"
    assert list(seen) == [*learner.block_names, ""]
    taught = set().union(*(with_gradient for with_gradient, _ in seen.values()))
    assert taught == {key for key, p in learner.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in learner.parameters())

    learner.step(images, labels)
    last = learner.step(images, labels)
    for block, loss in last.block_losses.items():
        assert loss < first.block_losses[block], block


def gradients_at_updates(learner: LocalLearner) -> dict[str, tuple[set[str], set[str]]]:
    """Block -> names of the parameters that have a gradient when it is updated, and of those that
    may have: its own, its head's, those that learn with it, and what several blocks share."""
    names = {id(p): name for name, p in learner.named_parameters()}
    shared = {f"model.{name}" for name in learner.plan.shared}
    seen: dict[str, tuple[set[str], set[str]]] = {}

    def spy(block: str, optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step
        own = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

        def spied() -> None:
            with_gradient = {n for n, p in learner.named_parameters() if p.grad is not None}
            seen[block] = with_gradient, own | shared
            step()

        optimizer.step = spied

    for block, optimizer in learner.optimizers.items():
        spy(block, optimizer)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_activation_memory_is_below_that_of_backpropagation(name: str) -> None:
    peaks = {}
    for rule in ("lls", "bp"):
        model, size = build(name)
        images, labels = batch(size)
        # Without optimizer state and updates, which are not activations.
        learner = LocalLearner(
            model,
            rule,
            num_classes=K,
            example_input=images,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, foreach=False),
            backend="autograd",
            recalibration_batches=0,
        )
        learner.step(images, labels)
        peaks[rule] = peak_memory_bytes(functools.partial(learner.step, images, labels))
    assert peaks["lls"] < peaks["bp"]
