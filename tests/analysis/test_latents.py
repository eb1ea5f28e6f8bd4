"""What is read of a network's blocks is what their heads read in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from locallearn import LocalLearner, build_model, build_rule, list_models
from locallearn.analysis.latents import (
    block_views,
    choose_view,
    class_means,
    local_logits,
    observe,
)
from locallearn.analysis.layers import head_accuracies
from locallearn.errors import UserError
from locallearn.kernels import pool_latents

NAMES = ["conv1", "conv2", "conv3", "linear1"]


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    pass


def make(rule: str = "lls", **settings) -> LocalLearner:
    options = settings.pop("options", {})
    model = build_model("smallconv", num_classes=3, in_channels=1, image_size=8, width=0.25)
    return LocalLearner(model, build_rule(rule, **options), backend="autograd", **settings).eval()


def batches(num: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 2, 1])) for _ in range(num)]


@pytest.mark.parametrize("rule", ["lls", "lls-mxm", "local-losses", "bp", "dfa", "pepita"])
def test_features_are_the_activations_before_the_pool(rule: str) -> None:
    learner = make(rule)
    views = block_views(learner)
    assert [view.name for view in views] == NAMES
    assert all((view.head is None) == (rule in ("bp", "dfa", "pepita")) for view in views)
    (batch,) = batches(1)
    (seen,) = observe(learner, views, [batch])
    assert torch.equal(seen.logits, learner(batch[0]))
    conv1, conv2 = learner.model.conv1, learner.model.conv2
    with torch.no_grad():
        hidden = conv2.activation(conv1(batch[0]))
    assert torch.equal(seen.features["conv2"], hidden)
    assert torch.equal(views[1].latents(hidden), pool_latents(hidden, 2))
    assert seen.features["linear1"].shape == (5, 128)
    assert not conv1.pool._forward_pre_hooks


def test_every_block_of_every_network_is_read() -> None:
    for name in list_models():
        model = build_model(name, num_classes=3, in_channels=1, image_size=32, width=0.05)
        learner = LocalLearner(model, "lls", backend="autograd").eval()
        views = block_views(learner)
        (seen,) = observe(learner, views, [(torch.randn(2, 1, 32, 32), torch.tensor([0, 1]))])
        for view in views:
            latents = view.latents(seen.features[view.name])
            assert latents.shape == (2, view.spec.latent_length), (name, view.name)


def test_features_behind_the_pool_and_of_groups() -> None:
    learner = make(head_after_pool=True)
    views = block_views(learner, head_after_pool=True)
    (batch,) = batches(1)
    (seen,) = observe(learner, views, [batch])
    with torch.no_grad():
        assert torch.equal(seen.features["conv1"], learner.model.conv1(batch[0]))
    assert [view.name for view in block_views(make(group_blocks=2))] == ["conv2", "linear1"]


@pytest.mark.parametrize("rule", ["lls", "lls-m", "lls-mxm", "lls-s", "local-losses"])
def test_local_logits_are_the_heads_own(rule: str) -> None:
    learner = make(rule)
    (batch,) = batches(1)
    views = block_views(learner)
    (seen,) = observe(learner, views, [batch])
    for view in views:
        features = seen.features[view.name]
        own = view.head.signal(view.latents(features), batch[1]).logits
        torch.testing.assert_close(local_logits(view, features), own)


def test_local_logits_of_heads_that_are_no_projection() -> None:
    (batch,) = batches(1)
    for local_loss, has in (("predsim", True), ("sim", False)):
        learner = make("local-losses", options={"local_loss": local_loss})
        views = block_views(learner)
        (seen,) = observe(learner, views, [batch])
        logits = local_logits(views[0], seen.features["conv1"])
        assert (logits is not None) == has
        if has:
            own = views[0].head.loss(seen.features["conv1"], batch[1])[1]
            torch.testing.assert_close(logits, own)
    views = block_views(make("drtp"))
    assert local_logits(views[0], seen.features["conv1"]) is None
    assert local_logits(block_views(make("bp"))[0], seen.features["conv1"]) is None


def test_class_means_by_hand() -> None:
    learner, given = make(), batches()
    views = block_views(learner)
    found = class_means(learner, views, given, only_correct=False)
    assert found.kept.tolist() == [True] * 10
    assert found.counts.tolist() == [2, 4, 4]
    images, labels = (torch.cat(part) for part in zip(*given, strict=True))
    with torch.no_grad():
        latents = pool_latents(learner.model.conv1.activation(images), 4).double()
    q = latents / latents.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.means["conv1"][2], q[labels == 2].mean(dim=0))

    right = learner(images).argmax(dim=1) == labels
    assert 0 < int(right.sum()) < 10
    found = class_means(learner, views, given, only_correct=True)
    assert found.counts.tolist() == torch.bincount(labels[right], minlength=3).tolist()
    first = int(labels[right][0])
    expected = q[right & (labels == first)].mean(dim=0)
    torch.testing.assert_close(found.means["conv1"][first], expected)
    assert torch.equal(found.kept, right)
    # Another network's, on the images that this one is right on.
    among = class_means(learner, views, given, among=right)
    assert torch.equal(among.counts, found.counts)
    torch.testing.assert_close(among.means, found.means, rtol=0, atol=0, equal_nan=True)


def test_head_accuracies_count_right_answers() -> None:
    learner, given = make("lls-mxm"), batches(3)
    by_block, network = head_accuracies(learner, block_views(learner), given)
    images, labels = (torch.cat(part) for part in zip(*given, strict=True))
    right = int((learner(images).argmax(dim=1) == labels).sum())
    assert network == pytest.approx(100 * right / 15)
    latents = pool_latents(learner.model.conv1.activation(images), 4)
    answers = (latents @ learner.heads[0].projection().T).argmax(dim=1)
    assert list(by_block) == NAMES
    assert by_block["conv1"] == pytest.approx(100 * int((answers == labels).sum()) / 15)


def test_choosing_a_block() -> None:
    views = block_views(make())
    assert choose_view(views, "conv2", 3) == 1
    assert choose_view(views, None, 2) == 2
    assert choose_view(views, None, 30) == 3
    with pytest.raises(UserError, match=r"unknown block 'conv9'. .* conv1, conv2, conv3, linear1"):
        choose_view(views, "conv9", 3)
