"""Classes that come equally often, validation parts of few images, and images seen by a view."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn import UserError
from locallearn.data import ImageLoader, InputSpec, MemoryImages, load_dataset
from locallearn.data.dataset import stratified_split
from locallearn.data.features import FeatureLoader
from locallearn.data.loader import balanced_order, epoch_generator

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([7, 7, 7], id="balanced"),
        pytest.param([20, 3, 1], id="one image is shown again and again"),
        pytest.param([2, 9], id="a number of images that two does not divide"),
        pytest.param([5, 0, 4], id="a class without images"),
    ],
)
def test_classes_come_equally_often_in_every_round(counts: list[int]) -> None:
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    order = balanced_order(labels, epoch_generator(0, 0))
    present = [label for label, n in enumerate(counts) if n]
    assert order.shape == labels.shape
    shown = labels[order].tolist()
    for first in range(0, len(shown) - len(present) + 1, len(present)):
        assert sorted(shown[first : first + len(present)]) == present
    # A class goes through all of its images before one of them comes again.
    for label in present:
        times = Counter(order[labels[order] == label].tolist()).values()
        assert max(times) - min(times) <= 1
        if len(times) < counts[label]:
            assert max(times) == 1


def test_the_order_follows_from_seed_and_epoch() -> None:
    labels = torch.tensor([0] * 9 + [1] * 3)
    orders = {
        tuple(balanced_order(labels, epoch_generator(seed, epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    again = balanced_order(labels, epoch_generator(1, 1))
    assert tuple(again.tolist()) in orders


def test_a_balanced_epoch_can_be_entered_anywhere() -> None:
    labels = torch.tensor([0] * 9 + [1] * 3)
    pixels = torch.arange(12, dtype=torch.uint8).repeat_interleave(4).view(12, 2, 2)
    source = MemoryImages.from_array(pixels, labels)
    inputs = InputSpec((2, 2), 1, None, (0.0,), (1.0,))
    loader = ImageLoader(source, inputs, batch_size=4, device=CPU, shuffle=True, balance=True)
    whole, later = list(loader.epoch(3)), list(loader.epoch(3, start=2))
    assert [batch_labels.bincount().tolist() for _, batch_labels in whole] == [[2, 2]] * 3
    assert len(later) == 1
    assert torch.equal(whole[2][0], later[0][0])


def test_features_come_in_the_order_of_the_images() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1])
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1)
    source = MemoryImages.from_array(pixels, labels)
    inputs = InputSpec((1, 1), 1, None, (0.0,), (1 / 255,))
    images = ImageLoader(source, inputs, batch_size=2, device=CPU, shuffle=True, seed=7)
    stored = torch.arange(5, dtype=torch.float32).view(1, 5, 1).numpy()
    features = FeatureLoader(
        stored,
        labels,
        kept_as="float32",
        dtype=torch.float32,
        batch_size=2,
        device=CPU,
        shuffle=True,
        seed=7,
    )
    assert len(images) == len(features) == 2  # a last batch of one image is left out
    assert images.num_images == features.num_images == 4
    for epoch in (0, 1):
        for (image, one), (feature, two) in zip(
            images.epoch(epoch), features.epoch(epoch), strict=True
        ):
            torch.testing.assert_close(image.flatten(), feature.flatten())
            assert torch.equal(one, two)


@pytest.mark.parametrize("kept_as", ["float32", "bf16"])
def test_every_view_is_drawn(kept_as: str) -> None:
    views = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 8, 1).contiguous()
    stored = views.numpy() if kept_as == "float32" else views.bfloat16().view(torch.int16).numpy()
    loader = FeatureLoader(
        stored,
        torch.zeros(8, dtype=torch.int64),
        kept_as=kept_as,
        dtype=torch.float64,
        batch_size=8,
        device=CPU,
    )
    drawn = torch.cat([features for epoch in range(4) for features, _ in loader.epoch(epoch)])
    assert drawn.dtype == torch.float64
    assert set(drawn.flatten().tolist()) == {1.0, 2.0, 3.0}


def test_at_least_one_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2)
    kept, held = stratified_split(labels, 0.2, 0)
    assert labels[held].tolist() == [0, 0]
    kept, held = stratified_split(labels, 0.2, 0, at_least=1)
    assert labels[held].tolist() == [0, 0, 1]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(12))


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    """Noise, brighter from class to class; RGB PNGs of (H, W) pixels."""
    noise = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(60 * label, 60 * label + 60, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


VIEW = InputSpec((8, 8), 1, None, (0.25,), (0.5,))


def test_images_are_scaled_to_what_a_network_sees(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"a": 5, "b": 5})
    dataset = load_dataset("folder", data_dir=root, view=VIEW)
    assert (dataset.inputs.image_size, dataset.inputs.num_channels) == ((8, 8), 1)
    assert (dataset.inputs.mean, dataset.inputs.std) == ((0.25,), (0.5,))
    loader = ImageLoader(dataset.train, dataset.inputs, batch_size=8, device=CPU)
    ((images, _),) = loader.epoch()
    assert images.shape == (8, 1, 8, 8)
    # Seen by what came of it, the data is loaded alike: so a run finds its images again.
    again = load_dataset("folder", data_dir=root, view=dataset.inputs)
    assert again.inputs == dataset.inputs
    assert again.fingerprint() == dataset.fingerprint()


def test_images_of_the_right_size_stay_as_they_are(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"a": 5, "b": 5}, size=(8, 8))
    assert load_dataset("folder", data_dir=root, view=VIEW).inputs.resize is None


def test_views_that_do_not_fit_are_said(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"a": 5, "b": 5})
    oblong = InputSpec((8, 6), 3, None, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UserError, match="8x6 pixels, and these are of other sizes"):
        load_dataset("folder", data_dir=root, view=oblong)
    with pytest.raises(UserError, match=r"'digits' are 1x8x8, and the network was trained on 3x8x"):
        load_dataset("digits", view=InputSpec((8, 8), 3, None, (0.0,) * 3, (1.0,) * 3))


def test_a_class_that_validation_would_empty_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"a": 9, "rare": 1})
    with pytest.raises(UserError, match="no training image of class 'rare', which has 1 in all"):
        load_dataset("folder", data_dir=root, val_split=0.2, holds_out_every_class=True)
