"""One contract over every registered model."""

from __future__ import annotations

import pytest
import torch

from locallearn import UserError, build_model, list_models
from locallearn.models import Block, model_spec

MODELS = ["mobilenet-v1", "smallconv", "smallconv-l", "vgg11", "vgg8"]

# Latent lengths T of the blocks, from the channel counts and pooling sizes of the paper's code.
LATENTS = {
    "smallconv": [512, 256, 512, 512],
    "smallconv-l": [1536, 768, 2048, 2048],
    "vgg8": [2048, 1024, 1024, 1024, 2048, 2048, 1024],
    "vgg11": [1024, 512, 1024, 1024, 2048, 2048, 2048, 2048, 2048, 2048],
    "mobilenet-v1": [2048, 1024, 2048, 2048, 1024, 1024, *[2048] * 6, 1024, 1024],
}


def blocks(model: torch.nn.Module) -> dict[str, Block]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Block)}


def test_what_is_registered() -> None:
    assert list_models() == MODELS
    assert list_models("vgg*") == ["vgg11", "vgg8"]
    assert all(model_spec(name).summary for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_latents_are_the_papers(name: str) -> None:
    found = blocks(build_model(name))
    assert [block.latent_length for block in found.values()] == LATENTS[name]
    assert max(LATENTS[name]) <= 2048


@pytest.mark.parametrize("name", MODELS)
def test_shapes_at_the_smallest_and_at_an_odd_size(name: str) -> None:
    side = model_spec(name).min_image_size
    for channels, classes, height, width in ((1, 2, side, side), (4, 11, side + 3, side + 9)):
        model = build_model(
            name, in_channels=channels, num_classes=classes, image_size=(height, width)
        ).eval()
        images = torch.randn(2, channels, height, width)
        features = model.forward_features(images)
        assert features.shape == (2, model.num_features)
        logits = model(images)
        assert logits.shape == (2, classes)
        assert torch.equal(model.forward_head(features), logits)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_has_a_position_at_the_smallest_size(name: str) -> None:
    """And at one pixel less some cell would not: the stated smallest size is the smallest."""
    side = model_spec(name).min_image_size
    model = build_model(name).eval()

    def smallest_slack(size: int) -> int:
        slack = []
        for block in blocks(model).values():
            block.activation, plain = _recording(block, slack), block.activation
            block.__dict__["_plain"] = plain
        try:
            model(torch.randn(1, 3, size, size))
        except RuntimeError:  # a max-pool that is left without a position
            return -1
        finally:
            for block in blocks(model).values():
                del block.activation, block._plain
        return min(slack)

    def _recording(block: Block, slack: list[int]):
        def record(x: torch.Tensor) -> torch.Tensor:
            h = type(block).activation(block, x)
            if h.ndim == 4:
                slack.append(min(h.shape[2:]) - block.latent_size)
            return h

        return record

    assert smallest_slack(side) >= 0
    assert smallest_slack(side // 2) < 0


def test_block_is_activation_then_downsample() -> None:
    for block in blocks(build_model("smallconv")).values():
        block.eval()
    model = build_model("smallconv").eval()
    x = torch.randn(2, 3, 16, 16)
    h = model.conv1.activation(x)
    assert h.shape == (2, 32, 16, 16)
    assert torch.equal(model.conv1.downsample(h), model.conv1(x))
    assert model.conv1(x).shape == (2, 32, 8, 8)


def test_dropout_acts_between_blocks_only_in_training() -> None:
    model = build_model("smallconv", dropout=0.5)
    x = torch.randn(4, 3, 16, 16)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg9"}, r"unknown model 'vgg9'. Did you mean 'vgg8'\? Valid: mobilenet-v1"),
        ({"name": "vgg8", "image_size": 8}, r"8x8 pixels are too small for vgg8, .* 16x16. Models"),
        ({"name": "mobilenet-v1", "image_size": (64, 31)}, r"64x31 .* at least 32x32"),
        ({"name": "smallconv", "num_classes": 0}, r"num_classes must be at least 1, got 0"),
        ({"name": "smallconv", "in_channels": -1}, r"in_channels must be at least 1, got -1"),
        ({"name": "smallconv", "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_errors_say_what_is_valid(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(**arguments)
