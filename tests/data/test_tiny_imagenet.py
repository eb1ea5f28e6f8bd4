"""`tiny-imagenet`, from a small archive of its format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn import UserError
from locallearn.data import Augmentation, FileImages, load_dataset, tiny_imagenet

FOLDER = "tiny-imagenet-200"
CAT, SALAMANDER, BIRD = "n02124075", "n01629819", "n02012849"


def load(place: Path, **arguments):
    return load_dataset("tiny-imagenet", data_dir=place, **arguments)


@pytest.fixture
def root(tmp_path: Path, tiny_files: dict[str, bytes]) -> Path:
    for name, content in tiny_files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / FOLDER


def test_what_is_loaded(root: Path) -> None:
    data = load(root.parent)
    assert data.class_names == ("crane (n01629819)", "crane (n02012849)", "Egyptian cat")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # val_0 is annotated as the bird, the last of wnids.txt; labels go by the sorted ids.
    assert data.test.labels.tolist() == [1, 0, 2]
    assert data.inputs.image_size == (64, 64)
    assert data.inputs.num_channels == 3
    assert data.inputs.resize is None
    assert data.inputs.mean == (0.485, 0.456, 0.406)
    assert data.inputs.std == (0.229, 0.224, 0.225)
    assert data.augmentation == Augmentation(flip=True)
    gray = data.train.pixels[: 64 * 64]
    assert (gray == gray[:, :1]).all()
    second = Image.open(root / "train" / SALAMANDER / "images" / f"{SALAMANDER}_1.JPEG")
    pixels = data.train.pixels[64 * 64 : 2 * 64 * 64].view(64, 64, 3)
    assert np.array_equal(pixels.numpy(), np.asarray(second))
    assert data.notes == ()


def test_recipes(root: Path) -> None:
    for name, recipe in (
        ("none", Augmentation()),
        ("basic", Augmentation(flip=True)),
        ("standard", Augmentation(flip=True, erase_probability=0.2)),
    ):
        assert load(root, augment=name).augmentation == recipe
    with pytest.raises(UserError, match="fixed image size"):
        load(root, image_size=32)


def test_it_may_lie_in_any_of_three_places(
    root: Path, tmp_path: Path, make_zip, tiny_files, monkeypatch, server
) -> None:
    one, two = load(root), load(root.parent)
    archive = server.archive(f"{FOLDER}.zip", make_zip(tiny_files), folder=FOLDER)
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", archive)
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / f"{FOLDER}.zip").write_bytes(server.files[f"/{FOLDER}.zip"])
    three = load(tmp_path / "zip")
    assert server.asked == []
    four = load(tmp_path / "new")
    assert len(server.asked) == 1
    assert len({data.fingerprint() for data in (one, two, three, four)}) == 1
    with pytest.raises(UserError, match=r"words.txt is a file; give the directory that holds"):
        load(root / "words.txt")


def test_it_streams_where_memory_is_short(root: Path) -> None:
    data = load(root, memory_limit_bytes=1)
    assert isinstance(data.train, FileImages)
    assert "stream from disk" in data.notes[0]


def unlink(*parts: str) -> Callable[[Path], None]:
    return lambda root: root.joinpath(*parts).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content)


DAMAGE = [
    (unlink("wnids.txt"), r"wnids.txt is missing. Restore them, or remove tiny-imagenet-200 to"),
    (write("wnids.txt", b"\n"), r"wnids.txt is empty"),
    (write("wnids.txt", b"\xff\xfe\x80"), r"wnids.txt is no text file"),
    (unlink("words.txt"), r"words.txt is missing"),
    (write("words.txt", b"n00001740\tentity\n"), r"classes that .*words.txt lacks: n01629819, n02"),
    (lambda root: shutil.rmtree(root / "train" / BIRD), rf"are missing: .*train/{BIRD}/images. "),
    (
        lambda root: shutil.rmtree(root / "train"),
        r"are missing: .*n01629819/images, .*n02012849/im",
    ),
    (unlink("train", CAT, "images", f"{CAT}_3.JPEG"), rf"missing images: .*{CAT}_3.JPEG. Restore"),
    (write(f"train/{CAT}/images/{CAT}_2.JPEG", b"x"), rf"unreadable images: .*{CAT}_2.JPEG. "),
    (unlink("val", "images", "val_1.JPEG"), r"missing images: .*val/images/val_1.JPEG. Restore"),
    (lambda root: shutil.rmtree(root / "val" / "images"), r"val/images is missing"),
    (write("val/images/val_7.JPEG", b"x"), r"images that .*val_annotations.txt lacks: .*val_7.JP"),
    (unlink("val", "val_annotations.txt"), r"val_annotations.txt is missing"),
    (
        write("val/val_annotations.txt", b"val_0.JPEG\tn99\t0\t0\t1\t1\n"),
        r"val_annotations.txt, line 1: expected a file, a tab and a class .*, got 'val_0.JPEG",
    ),
    (
        write("val/val_annotations.txt", b"val_0.JPEG"),
        r"line 1: expected a file, a tab and a class",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_is_missing_or_broken_is_named(root: Path, damage, message: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_an_image_cut_off_in_its_pixels_is_named(root: Path) -> None:
    path = root / "val" / "images" / "val_2.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"unreadable images: .*val_2.JPEG. Remove or replace"):
        load(root)


def test_an_image_of_another_size_is_named(root: Path) -> None:
    path = root / "train" / CAT / "images" / f"{CAT}_1.JPEG"
    Image.new("RGB", (32, 64)).save(path)
    with pytest.raises(UserError, match=rf"images that are not 64x64 pixels: .*{CAT}_1.JPEG. Rest"):
        load(root)


def test_without_box_files_the_images_count(root: Path) -> None:
    for path in root.rglob("*_boxes.txt"):
        path.unlink()
    (root / "train" / CAT / "images" / f"{CAT}_3.JPEG").unlink()
    assert torch.bincount(load(root).train.labels).tolist() == [4, 4, 3]
    for path in (root / "train" / CAT / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"{CAT}/images holds no images"):
        load(root)
