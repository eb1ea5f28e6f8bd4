"""Grad-CAM on a network whose answer is known to rest on one corner."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from locallearn import build_model
from locallearn.analysis.gradcam import Deletion, deletion, excess, heat_maps, hottest, load_captum
from locallearn.errors import UserError

pytest.importorskip("captum")


class Corner(nn.Module):
    """Class 1's logit is ten times the mean of the top left quarter; class 0's is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.features.weight)

    def forward(self, images: Tensor) -> Tensor:
        h = self.features(images)
        height, width = h.shape[2:]
        corner = h[:, 0, : height // 2, : width // 2].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(corner), 10 * corner], dim=1)


@pytest.fixture
def images() -> Tensor:
    """A bright corner, and a dim rest."""
    images = 0.1 * torch.rand(12, 1, 8, 8)
    images[:, :, :4, :4] += 1
    return images


def test_heat_is_where_the_answer_is_from(images: Tensor) -> None:
    model, targets = Corner().eval(), torch.ones(12, dtype=torch.int64)
    heat = heat_maps(model, model.features, images, targets)
    assert heat.shape == (12, 8, 8)
    # By the formula: A = image, weight = mean over places of d logit / dA = 10 / 64.
    torch.testing.assert_close(heat, images[:, 0] * 10 / 64)
    assert hottest(heat, 0.25)[:, :4, :4].all()
    assert hottest(heat, 0.25).sum() == 12 * 16
    against = heat_maps(model, model.features, images, torch.zeros_like(targets))
    assert (against == 0).all()


def test_heat_of_a_coarse_layer_is_interpolated() -> None:
    """And nothing of it is left in the model."""
    model = build_model("smallconv", num_classes=3, in_channels=1, image_size=8, width=0.25).eval()
    with torch.no_grad():  # as inside a command that infers
        heat = heat_maps(model, model.conv3, torch.randn(2, 1, 8, 8), torch.tensor([0, 2]))
    assert heat.shape == (2, 8, 8)
    assert not heat.requires_grad
    assert heat.std() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_deleting_what_counts_lowers_the_probability(images: Tensor) -> None:
    model, targets = Corner().eval(), torch.ones(12, dtype=torch.int64)
    heat = heat_maps(model, model.features, images, targets)
    drops = deletion(model, images, targets, heat, batch_size=5)
    # The hottest 13 of 64 pixels lie in the corner of 16; other images' masks do so too.
    assert (drops.hottest > drops.shifted).all()
    assert excess(drops.hottest, drops.shifted).p_value < 0.001
    assert drops.other is not None
    assert abs(excess(drops.hottest, drops.other).value) < 0.1
    whole = deletion(model, images, targets, heat, batch_size=12)
    for ours, theirs in zip(vars(drops).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_maps_of_the_wrong_place_are_found_out(images: Tensor) -> None:
    model, targets = Corner().eval(), torch.ones(12, dtype=torch.int64)
    drops = deletion(model, images, targets, -images[:, 0])
    assert excess(drops.hottest, drops.shifted).value < 0
    assert excess(drops.hottest, drops.shifted).p_value > 0.9


def test_one_image_has_no_other(images: Tensor) -> None:
    model = Corner().eval()
    drops = deletion(model, images[:1], torch.ones(1, dtype=torch.int64), images[:1, 0])
    assert isinstance(drops, Deletion)
    assert drops.other is None


def test_excess_by_hand() -> None:
    """Of three differences all above zero, one choice of signs in eight reaches the mean."""
    result = excess(torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.1, 0.1, 0.1]))
    assert result.value == pytest.approx(0.3)
    assert result.mean == pytest.approx(0, abs=0.02)
    assert result.p_value == pytest.approx(1 / 8, abs=0.02)


def test_without_captum_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r"needs captum: pip install 'locallearn\[gradcam\]'"):
        load_captum()
