"""Augmentation against torchvision's own, and its randomness."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2

from locallearn.data.augment import (
    Augmentation,
    Draws,
    crop_corner,
    draw_epoch,
)
from locallearn.data.images import MemoryImages
from locallearn.kernels import Crops, load_kernels


def drawn(recipe: Augmentation, num: int, size: tuple[int, int], seed: int = 0) -> Draws:
    return draw_epoch(recipe, num, size, torch.Generator().manual_seed(seed))


def crops(images: MemoryImages, recipe: Augmentation, size, draws: Draws) -> torch.Tensor:
    """The pixels themselves, (B, H, W, C): mean 0 and a std of 1/255 leave them as they are."""
    (batch,) = images.batches([torch.arange(len(images))], [draws], size, recipe)
    channels = images.pixels.shape[1]
    std = torch.full((channels,), 1 / 255)
    out = load_kernels("reference").augment(batch, torch.zeros(channels), std, size=size)
    return out.permute(0, 2, 3, 1).round().to(torch.uint8)


def ragged(sizes: list[tuple[int, int]], channels: int = 3) -> tuple[MemoryImages, list]:
    arrays = [torch.randint(256, (h, w, channels), dtype=torch.uint8) for h, w in sizes]
    images = MemoryImages(
        torch.cat([a.reshape(-1, channels) for a in arrays]),
        torch.tensor([h for h, _ in sizes]),
        torch.tensor([w for _, w in sizes]),
        torch.arange(len(sizes)),
    )
    return images, arrays


@pytest.mark.parametrize("channels", [1, 3])
def test_centre_crop_is_torchvisions(channels: int) -> None:
    images, arrays = ragged([(8, 8), (9, 13), (12, 8), (11, 11)], channels)
    recipe = Augmentation()
    out = crops(images, recipe, (8, 7), drawn(recipe, 4, (8, 7)))
    for crop, array in zip(out, arrays, strict=True):
        expected = v2.functional.center_crop(array.permute(2, 0, 1), [8, 7]).permute(1, 2, 0)
        assert torch.equal(crop, expected)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (4, False), (2, True)])
def test_random_crop_pads_and_mirrors_as_torchvision(pad: int, flip: bool) -> None:
    images, arrays = ragged([(8, 8), (9, 13), (12, 8)] * 5)
    recipe = Augmentation(pad=pad, random_crop=True, flip=flip)
    draws = drawn(recipe, 15, (8, 8))
    out = crops(images, recipe, (8, 8), draws)
    top, left = crop_corner(images.heights, images.widths, (8, 8), draws.place, recipe)
    for i, array in enumerate(arrays):
        padded = v2.functional.pad(array.permute(2, 0, 1), [pad] * 4)
        expected = v2.functional.crop(padded, int(top[i]) + pad, int(left[i]) + pad, 8, 8)
        if draws.flip[i]:
            expected = v2.functional.horizontal_flip(expected)
        assert torch.equal(out[i], expected.permute(1, 2, 0))
    assert draws.flip.any() == flip


def test_crops_reach_every_place_equally_often() -> None:
    recipe = Augmentation(pad=1, random_crop=True)
    num = 9000
    top, left = crop_corner(
        torch.full((num,), 8),
        torch.full((num,), 8),
        (8, 8),
        drawn(recipe, num, (8, 8)).place,
        recipe,
    )
    counts = torch.zeros(3, 3)
    for y in (-1, 0, 1):
        for x in (-1, 0, 1):
            counts[y + 1, x + 1] = ((top == y) & (left == x)).sum()
    assert counts.sum() == num
    assert (counts - num / 9).abs().max() < 5 * math.sqrt(num / 9)


def test_place_at_its_upper_end_stays_inside() -> None:
    recipe = Augmentation(random_crop=True)
    top, _ = crop_corner(
        torch.tensor([40_000]),
        torch.tensor([8]),
        (8, 8),
        torch.tensor([[1 - 2**-24, 0.0]]),
        recipe,
    )
    assert int(top) <= 40_000 - 8


def test_erased_rectangles_have_torchvisions_distribution() -> None:
    """Area and aspect ratio of the boxes, against a thousand of torchvision's own."""
    recipe = Augmentation(erase_probability=1.0)
    size = (32, 32)
    box = drawn(recipe, 4000, size).box.double()
    ours = torch.stack([box[:, 2] * box[:, 3] / 1024, (box[:, 2] / box[:, 3]).log()])
    image = torch.zeros(3, *size)
    theirs = []
    for _ in range(1000):
        _, _, h, w, _ = v2.RandomErasing(p=1.0).make_params([image]).values()
        theirs.append([h * w / 1024, math.log(h / w)])
    theirs = torch.tensor(theirs, dtype=torch.float64).T
    error = (theirs.var(dim=1) / 1000 + ours.var(dim=1) / 4000).sqrt()
    assert ((ours.mean(dim=1) - theirs.mean(dim=1)).abs() < 4 * error).all()
    assert torch.allclose(ours.std(dim=1), theirs.std(dim=1), rtol=0.12)
    assert (box[:, 0] + box[:, 2] <= 32).all()
    assert (box[:, 1] + box[:, 3] <= 32).all()


def test_erase_probability_and_place() -> None:
    recipe = Augmentation(erase_probability=0.2)
    box = drawn(recipe, 5000, (16, 16)).box
    share = (box[:, 2] > 0).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.03)


def plain(images: torch.Tensor) -> Crops:
    """Whole images, (B, H, W, C) uint8, as they are."""
    b, h, w, c = images.shape
    zero = torch.zeros(b, dtype=torch.int64)
    return Crops(
        images.reshape(-1, c),
        torch.arange(b) * h * w,
        zero + h,
        zero + w,
        zero,
        zero,
        torch.zeros(b, dtype=torch.bool),
        torch.zeros(b, 4, dtype=torch.int32),
    )


def test_erasing_sets_the_mean_colour() -> None:
    box = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]], dtype=torch.int32)
    crops = plain(torch.full((2, 6, 6, 3), 255, dtype=torch.uint8))._replace(box=box)
    images = load_kernels("reference").augment(crops, torch.zeros(3), torch.ones(3), size=(6, 6))
    expected = torch.ones(6, 6)
    expected[1:4, 2:6] = 0
    torch.testing.assert_close(images[0], expected.expand(3, 6, 6))
    torch.testing.assert_close(images[1], torch.ones(3, 6, 6))


def test_normalize() -> None:
    images = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.0)
    out = load_kernels("reference").augment(
        plain(images), torch.tensor(mean), torch.tensor(std), size=(5, 4)
    )
    expected = v2.functional.normalize(images.permute(0, 3, 1, 2) / 255, list(mean), list(std))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_differ_and_seeds_repeat() -> None:
    recipe = Augmentation(pad=4, random_crop=True, flip=True, erase_probability=0.5)
    a, b, c = (drawn(recipe, 64, (32, 32), seed) for seed in (1, 1, 2))
    assert torch.equal(a.place, b.place)
    assert torch.equal(a.box, b.box)
    assert not torch.equal(a.place, c.place)
    assert len(a.place.unique(dim=0)) == 64


def test_describe() -> None:
    assert Augmentation().describe() == "none"
    assert (
        Augmentation(pad=4, random_crop=True, flip=True, erase_probability=0.2).describe()
        == "random crop (pad 4), flip, erase p=0.2"
    )
