"""How outputs lie: by their shapes, and by where an image's values are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locallearn import LocalLearner, UserError
from locallearn.engine.blocks import PLAIN, LatentSize, Layout, Parts, plan_blocks
from locallearn.engine.blocks.layout import fitting_layout, latent_size_of, possible_layouts

pytestmark = pytest.mark.usefixtures("one_thread")

CONV, LINEAR, LSTM, CONV1D = nn.Conv2d(3, 8, 1), nn.Linear(6, 8), nn.LSTM(6, 8), nn.Conv1d(3, 8, 1)
NORM = nn.BatchNorm2d(8)
SEQUENCE = {"is_sequence": True}


@pytest.mark.parametrize(
    ("block", "shape", "expected", "why"),
    [
        (CONV, (3, 8, 4, 5), PLAIN, "an image"),
        (LINEAR, (3, 8), PLAIN, "features"),
        (CONV1D, (3, 8, 7), PLAIN, "a signal"),
        (nn.Conv3d(3, 8, 1), (3, 8, 2, 4, 5), PLAIN, "a volume"),
        (LINEAR, (3, 7, 8), Layout(0, 2, **SEQUENCE), "tokens"),
        (LSTM, (3, 7, 8), Layout(0, 2, **SEQUENCE), "a recurrent layer's"),
        (LSTM, (7, 3, 8), Layout(1, 2, **SEQUENCE), "sequence first"),
        (LSTM, (9, 3, 8), Layout(1, 2, **SEQUENCE), "sequence first, a multiple of N"),
        (LINEAR, (3, 4, 5, 8), Layout(0, 3), "an image, features last"),
        (LINEAR, (3, 8, 5), Layout(0, 1, **SEQUENCE), "features in the middle, as the layer says"),
        (LINEAR, (3, 8, 8), Layout(0, 2, **SEQUENCE), "either could be the features"),
        (CONV, (3, 4, 5, 8), Layout(0, 3), "a convolution, features last, as it says"),
        (CONV, (4, 3, 8, 5, 5), Layout(1, 2), "time first"),
        (NORM, (3, 8, 4, 4), PLAIN, "no layer with weights at all"),
        (CONV, (12, 8, 4, 4), Layout(0, 1, parts=Parts.OF_AN_IMAGE), "windows"),
        (LINEAR, (12, 8), Layout(0, 1, parts=Parts.OF_AN_IMAGE), "features of windows"),
        (LINEAR, (12, 5, 8), Layout(0, 2, parts=Parts.OF_AN_IMAGE, **SEQUENCE), "their tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_likeliest_layout_by_shape(
    block: nn.Module, shape: tuple[int, ...], expected: Layout, why: str
) -> None:
    assert possible_layouts("b", block, torch.empty(shape), 3)[0] == expected


def test_a_shape_without_the_batch_is_an_error() -> None:
    with pytest.raises(UserError, match=r"block 'b' yields shape \(4, 8\) for 3 images: no dim"):
        possible_layouts("b", LINEAR, torch.empty(4, 8), 3)


@pytest.mark.parametrize("parts", list(Parts))
@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [(s, d) for s in [(8,), (8, 5), (8, 4, 5), (8, 2, 4, 5)] for d in range(min(3, len(s)))],
    ids=str,
)
def test_a_view_has_an_image_in_each_row_and_a_feature_in_each_column(
    shape: tuple[int, ...], batch_dim: int, parts: Parts
) -> None:
    """Values that say of which image and of which feature they are."""
    num, num_parts = 3, 2
    value = 10.0 * torch.arange(num).view(-1, *[1] * len(shape)) + torch.arange(8.0).view(
        -1, *[1] * (len(shape) - 1)
    )
    output = value.expand(num, *shape)
    if parts is Parts.OF_AN_IMAGE:
        output = output.repeat_interleave(num_parts, 0)
    elif parts is Parts.OF_ALL_IMAGES:
        output = output.repeat(num_parts, *[1] * len(shape))
    output = output.movedim(0, batch_dim)
    layout = Layout(batch_dim, 0 if batch_dim else 1, parts=parts)
    view = layout.view(output, num)
    assert view.shape[:2] == (num, 8)
    assert view.ndim == (2 if shape == (8,) and parts is Parts.NONE else 4)
    expected = 10 * torch.arange(num)[:, None] + torch.arange(8)
    assert torch.equal(view.flatten(2).amin(2) if view.ndim > 2 else view, expected.float())
    assert torch.equal(view.flatten(2).amax(2) if view.ndim > 2 else view, expected.float())


def test_a_view_of_another_number_of_images_is_an_error() -> None:
    with pytest.raises(UserError, match=r"shape \(7, 8\) for 3 images, of which dimension 0 was"):
        PLAIN.view(torch.empty(7, 8), 3)


def test_images_that_changed_places_tell_the_layout() -> None:
    rows = torch.randn(3, 3, 8)
    layouts = possible_layouts("b", LINEAR, rows, 3)
    assert [layout.batch_dim for layout in layouts] == [0, 1]
    assert fitting_layout(layouts, rows, rows.roll(1, 0), 3).batch_dim == 0
    assert fitting_layout(layouts, rows, rows.roll(1, 1), 3).batch_dim == 1
    assert fitting_layout(layouts, rows, torch.randn(3, 3, 8), 3).batch_dim == 0  # not even one
    assert fitting_layout(layouts, torch.zeros(3, 3, 8), torch.zeros(3, 3, 8), 3).batch_dim == 0


class OverTime(nn.Module):
    """Each image is seen at two times, all images of a time together."""

    def __init__(self, *, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        dim = 0 if self.time_first else 1
        frames = torch.stack([x, x.flip(3) / 2], dim).flatten(0, 1)
        h = self.conv(frames).mean((2, 3))
        return self.out(h.unflatten(0, (2, -1) if self.time_first else (-1, 2)).mean(dim))


class Tokens(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if self.batch_first else 0
        return self.out(self.layer(x if self.batch_first else x.transpose(0, 1)).mean(dim))


@pytest.mark.parametrize("backend", ["autograd", "reference"])
def test_parts_of_images_learn_from_their_own_labels(backend: str) -> None:
    """The same network with its frames in another order learns the same."""
    losses = []
    images, labels = torch.randn(6, 3, 6, 6), torch.arange(6) % 4
    for time_first in (True, False):
        torch.manual_seed(1)
        model = OverTime(time_first=time_first).double()
        learner = LocalLearner(
            model, "lls", num_classes=4, example_input=images.double(), backend=backend
        )
        steps = [learner.step(images.double(), labels) for _ in range(3)]
        losses.append(torch.stack([step.block_losses["conv"] for step in steps]))
        assert learner.block_paths == {"conv": "generic"}  # the closed form is for whole images
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("length", [3, 6, 7])
def test_sequence_first_learns_as_batch_first(length: int) -> None:
    """Also where the sequence is as long as the number of images that a trace takes, 3."""
    losses = []
    tokens, labels = torch.randn(6, length, 8).double(), torch.arange(6) % 4
    for batch_first in (True, False):
        torch.manual_seed(1)
        model = Tokens(batch_first=batch_first).double()
        learner = LocalLearner(model, "lls", num_classes=4, example_input=tokens, blocks=["layer"])
        assert learner.plan is not None
        assert learner.plan.blocks[0].layout == Layout(int(not batch_first), 2, is_sequence=True)
        steps = [learner.step(tokens, labels) for _ in range(2)]
        losses.append(torch.stack([step.block_losses["layer"] for step in steps]))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_blocks_are_found_from_few_images_and_learn_from_any_number(num: int) -> None:
    model = Tokens(batch_first=True)
    learner = LocalLearner(
        model, "lls", num_classes=4, blocks=["layer"], example_input=torch.randn(num, 7, 8)
    )
    for other in (1, 2, 6):
        result = learner.step(torch.randn(other, 7, 8), torch.arange(other) % 4)
        assert result.block_logits["layer"].shape == (other, 4)


def test_images_of_another_size_than_the_example_s() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learner = LocalLearner(model, "lls", num_classes=4, example_input=torch.randn(4, 3, 9, 9))
    learner.step(torch.randn(4, 3, 14, 11), torch.arange(4))


@pytest.mark.parametrize(
    ("shape", "is_sequence", "size", "length"),
    [
        ((2, 8), False, 8, 8),
        ((2, 5000), False, 2048, 2048),
        ((2, 8, 32, 32), False, 4, 128),
        ((2, 8, 3, 3), False, 3, 72),
        ((2, 8, 1, 1), False, 1, 8),
        ((2, 512, 8, 8), False, 2, 2048),
        ((2, 8, 32, 1), False, (4, 1), 32),
        ((2, 8, 49, 1), True, 1, 8),
        ((2, 3000, 4, 4), False, 1, 3000),
    ],
)
def test_latent_size(
    shape: tuple[int, ...], is_sequence: bool, size: LatentSize, length: int
) -> None:
    assert latent_size_of(torch.empty(shape), is_sequence=is_sequence) == (size, length)


def test_a_block_that_draws_random_numbers_is_taken_by_its_shape() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) + torch.randn_like(x)

    model = nn.Sequential(Noise(), Noise(), nn.Flatten(), nn.Linear(24, 4))
    plan = plan_blocks(model, ["0", "1"], inputs=torch.randn(3, 3, 8), num_classes=4)
    assert [block.layout for block in plan.blocks] == [Layout(0, 2, is_sequence=True)] * 2
