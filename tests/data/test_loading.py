"""Datasets, splits, sources and the loader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn import UserError
from locallearn.data import (
    Augmentation,
    FileImages,
    ImageLoader,
    InputSpec,
    MemoryImages,
    list_datasets,
    load_dataset,
    read_for_prediction,
)
from locallearn.data.builtin import _read_digits
from locallearn.data.dataset import stratified_order, stratified_split
from locallearn.data.images import decode_all
from locallearn.data.reading import read_header, read_image

CPU = torch.device("cpu")
MakeFolder = Callable[..., Path]


def everything(loader: ImageLoader, epoch: int = 0, start: int = 0):
    batches = list(loader.epoch(epoch, start))
    return [x for x, _ in batches], [y for _, y in batches]


# -- digits, splits, limits ---------------------------------------------------------------------


def test_what_is_registered() -> None:
    names = "cifar10 cifar100 digits fashion-mnist folder imagenette mnist tiny-imagenet vww"
    assert list_datasets() == names.split()


def test_digits_need_nothing() -> None:
    data = load_dataset("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.inputs.image_size == (8, 8)
    assert data.inputs.num_channels == 1
    assert data.num_classes == 10
    pixels = data.train.pixels.double() / 255
    assert data.inputs.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert data.inputs.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-12)
    again = load_dataset("digits")
    assert again.fingerprint() == data.fingerprint()


@pytest.mark.parametrize("place", ["own", "elsewhere"])
def test_digits_are_scikit_learns(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from its file, and by it where the file is not where it was."""
    from sklearn.datasets import load_digits

    if place == "elsewhere":
        elsewhere = ModuleSpec("sklearn", None, origin="/nonexistent/sklearn/__init__.py")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: elsewhere)
    expected = load_digits()
    images, labels = _read_digits()
    assert np.array_equal(images, expected.images)
    assert np.array_equal(labels, expected.target)


def test_validation_split_is_stratified_seeded_and_disjoint() -> None:
    whole = load_dataset("digits")
    a, b, c = (load_dataset("digits", val_split=0.25, seed=s) for s in (0, 0, 1))
    assert a.val is not None
    assert len(a.train) + len(a.val) == len(whole.train)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    total = torch.bincount(whole.train.labels)
    held = torch.bincount(a.val.labels)
    assert ((held - 0.25 * total).abs() <= 0.5).all()
    assert whole.test.fingerprint() == a.test.fingerprint()


def test_split_is_a_partition() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    kept, held = stratified_split(labels, 0.3, seed=5)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(14))
    assert torch.bincount(labels[held]).tolist() == [3, 1]


def test_every_beginning_of_the_stratified_order_is_balanced() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for num in (10, 20, 50):
        share = torch.bincount(labels[order[:num]], minlength=3) / num
        assert (share - torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1.01 / num


def test_limits() -> None:
    data = load_dataset("digits", limit_train=50, limit_test=20)
    assert len(data.train) == 50
    assert len(data.test) == 20
    assert torch.bincount(data.train.labels).tolist() == [5] * 10
    assert len(load_dataset("digits", limit_train=10**6).train) == 1438


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "minst"}, r"unknown dataset 'minst'. Did you mean 'mnist'\? Valid: cifar10"),
        ({"name": "folder"}, r"dataset 'folder' needs --data-dir"),
        ({"name": "digits", "augment": "heavy"}, r"unknown augmentation 'heavy'"),
        ({"name": "digits", "image_size": 16}, r"fixed image size"),
        ({"name": "digits", "limit_train": 0}, r"--limit-train must be at least 1, got 0"),
        ({"name": "digits", "limit_test": -3}, r"--limit-test must be at least 1, got -3"),
        ({"name": "digits", "val_split": 1.0}, r"--val-split must be in \[0, 1\), got 1.0"),
        ({"name": "digits", "val_split": 1e-4}, r"leaves one of the parts empty"),
    ],
)
def test_errors_say_what_is_valid(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(**arguments)


# -- torchvision's, from files of the published format made here --------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_mnist_is_read_from_its_original_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, num in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (num, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(num) % 10)
    data = load_dataset("mnist", data_dir=tmp_path)
    assert (len(data.train), len(data.test)) == (30, 12)
    assert data.inputs == InputSpec((28, 28), 1, None, (0.5,), (0.5,))
    assert data.augmentation == Augmentation(pad=4, random_crop=True)
    assert torch.equal(data.test.pixels[:784, 0].view(28, 28), torch.from_numpy(images[0]).byte())


def test_what_cannot_be_downloaded_leaves_nothing(tmp_path, monkeypatch) -> None:
    import torchvision

    def refuse(self) -> None:
        (Path(self.root) / "MNIST" / "raw").mkdir(parents=True)
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    with pytest.raises(UserError, match=r"'mnist' can neither be read .*downloaded.*Give"):
        load_dataset("mnist", data_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- folders ------------------------------------------------------------------------------------


def test_folder_of_equal_images(make_folder: MakeFolder) -> None:
    root = make_folder()
    data = load_dataset("folder", data_dir=root, augment="standard")
    assert data.class_names == ("apple", "pear", "plum")
    assert data.inputs.image_size == (12, 12)
    assert data.inputs.num_channels == 3
    assert data.inputs.resize is None
    assert data.notes == ()
    assert (len(data.train), len(data.test)) == (24, 24)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.augmentation.pad == 1
    pixels = data.train.pixels.double() / 255
    assert data.inputs.mean == pytest.approx(pixels.mean(dim=0).tolist(), abs=1e-12)
    assert data.inputs.std == pytest.approx(pixels.std(dim=0, correction=0).tolist(), abs=1e-12)
    first = np.asarray(Image.open(root / "train" / "apple" / "000.png"))
    assert torch.equal(data.train.pixels[:144].view(12, 12, 3), torch.from_numpy(first.copy()))


def test_gray_folder_has_one_channel(make_folder: MakeFolder) -> None:
    data = load_dataset("folder", data_dir=make_folder(mode="L"))
    assert data.inputs.num_channels == 1


def test_folder_without_test_part_holds_a_fifth_out(make_folder: MakeFolder) -> None:
    root = make_folder(parts=("train",), per_class=10)
    for directory, name in ((root, "train alone"), (root / "train", "classes alone")):
        data = load_dataset("folder", data_dir=directory)
        assert (len(data.train), len(data.test)) == (24, 6), name
        assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
        assert "is held out" in data.notes[0]


@pytest.mark.parametrize(
    ("augment", "image_size", "resize", "crop"),
    [("none", None, 128, 128), ("basic", None, 132, 128), ("standard", 16, 20, 16)],
)
def test_folder_of_unequal_images_is_scaled(
    make_folder: MakeFolder, augment: str, image_size: int | None, resize: int, crop: int
) -> None:
    root = make_folder(sizes=((20, 30), (40, 18)), per_class=2)
    data = load_dataset("folder", data_dir=root, augment=augment, image_size=image_size)
    assert data.inputs.image_size == (crop, crop)
    assert data.inputs.resize == resize
    assert data.train.heights.tolist()[:2] == [resize, int(resize * 40 / 18)]
    assert data.train.widths.tolist()[:2] == [int(resize * 30 / 20), resize]
    assert bool(data.notes) == (image_size is None)


def test_streaming_gives_the_same_batches_as_memory(make_folder: MakeFolder) -> None:
    root = make_folder(sizes=((20, 30), (40, 18), (16, 16)), per_class=4)
    arguments = {"data_dir": root, "augment": "standard", "image_size": 16}
    memory = load_dataset("folder", **arguments)
    stream = load_dataset("folder", memory_limit_bytes=1, **arguments)
    assert isinstance(memory.train, MemoryImages)
    assert isinstance(stream.train, FileImages)
    assert "stream from disk" in stream.notes[-1]
    assert stream.inputs == memory.inputs
    loaders = [
        ImageLoader(
            data.train,
            data.inputs,
            batch_size=5,
            device=CPU,
            augmentation=data.augmentation,
            shuffle=True,
            seed=3,
        )
        for data in (memory, stream)
    ]
    for epoch, start in ((0, 0), (1, 1)):
        (xs, ys), (xs2, ys2) = (everything(loader, epoch, start) for loader in loaders)
        assert all(map(torch.equal, xs, xs2))
        assert all(map(torch.equal, ys, ys2))


def test_worker_processes_read_the_same(make_folder: MakeFolder) -> None:
    data = load_dataset("folder", data_dir=make_folder(), memory_limit_bytes=1)
    assert isinstance(data.train, FileImages)
    batches = []
    for workers in (0, 2):
        source = FileImages(data.train.paths, data.train.labels, 3, None, num_workers=workers)
        batches.append(everything(ImageLoader(source, data.inputs, batch_size=7, device=CPU))[0])
    assert all(map(torch.equal, *batches))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    source = FileImages([tmp_path / "turned.png"], torch.zeros(1, dtype=torch.int64), 1, None)
    header = read_header(tmp_path / "turned.png")
    assert (header.height, header.width) == (20, 10)
    decoded = decode_all(source)
    assert (decoded.heights.item(), decoded.widths.item()) == (20, 10)
    assert decoded.pixels.view(20, 10)[:10].min() == 255


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(tmp_path / "deep.png")
    assert read_header(tmp_path / "deep.png").is_gray
    assert set(read_image(tmp_path / "deep.png", 1).flatten().tolist()) == {20_000 // 257}
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="no known range"):
        read_image(tmp_path / "float.tif", 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
def test_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}", 3)
    assert pixels.shape == (4, 5, 3)
    assert pixels.min() == 255


def test_a_failed_download_removes_only_what_it_made(tmp_path, monkeypatch) -> None:
    import torchvision

    def refuse(self) -> None:
        (Path(self.root) / "MNIST" / "raw").mkdir(parents=True)
        raise AssertionError("broken file")

    (tmp_path / "project" / ".git" / "refs").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    with pytest.raises(UserError, match=r"neither be read .* nor be downloaded .*broken file"):
        load_dataset("mnist", data_dir=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_readers_leave_torchs_random_numbers_alone(make_folder: MakeFolder) -> None:
    root = make_folder()
    state = torch.get_rng_state()
    data = load_dataset("folder", data_dir=root, memory_limit_bytes=0)
    everything(ImageLoader(data.train, data.inputs, batch_size=4, device=CPU, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def damage(root: Path, what: str) -> None:
    apple = root / "train" / "apple"
    if what == "truncated":
        content = (apple / "001.jpg").read_bytes()
        (apple / "001.jpg").write_bytes(content[: len(content) // 2])
    elif what == "empty file":
        (apple / "002.jpg").write_bytes(b"")
    elif what == "text named jpg":
        (apple / "003.jpg").write_text("hello")
    elif what == "not an image":
        (apple / "notes.txt").write_text("hello")
    elif what == "empty class":
        for file in apple.iterdir():
            file.unlink()
    elif what == "one class":
        for part in ("train", "test"):
            for name in ("pear", "plum"):
                shutil.rmtree(root / part / name)
    elif what == "stray image":
        shutil.copy(apple / "001.jpg", root / "train" / "stray.jpg")
    elif what == "new test class":
        shutil.copytree(apple, root / "test" / "quince")
    elif what == "missing":
        shutil.rmtree(root)
    elif what == "empty":
        shutil.rmtree(root)
        root.mkdir()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"unreadable images: .*apple/001.jpg. Remove or replace"),
        ("empty file", r"unreadable images: .*apple/002.jpg"),
        ("text named jpg", r"unreadable images: .*apple/003.jpg"),
        ("not an image", r"files that are no images .*apple/notes.txt"),
        ("empty class", r"class folders without images in .*train: apple"),
        ("one class", r"has one class only \('apple'\); at least two"),
        ("stray image", r"lie in no class folder .*stray.jpg"),
        ("new test class", r"has classes that .*train lacks: quince"),
        ("missing", r"data directory .* does not exist"),
        ("empty", r"holds no class folders; expected"),
    ],
)
def test_bad_folders_are_one_clear_error(make_folder: MakeFolder, what: str, message: str) -> None:
    root = make_folder(suffix=".jpg")
    damage(root, what)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("folder", data_dir=root)
    assert "\n" not in str(error.value)


def test_many_broken_images_are_counted(make_folder: MakeFolder) -> None:
    root = make_folder(suffix=".jpg")
    for file in (root / "train" / "pear").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"pear/004.jpg and 3 more. Remove"):
        load_dataset("folder", data_dir=root)


def test_image_that_breaks_while_streaming_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(suffix=".jpg")
    data = load_dataset("folder", data_dir=root, memory_limit_bytes=1)
    (root / "test" / "plum" / "003.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"unreadable image .*plum/003.jpg"):
        everything(ImageLoader(data.test, data.inputs, batch_size=4, device=CPU))


def test_hidden_files_and_subfolders(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train" / "apple" / ".DS_Store").write_text("x")
    (root / "train" / "apple" / "Thumbs.db").write_text("x")
    (root / "train" / ".cache").mkdir()
    deeper = root / "train" / "apple" / "more"
    deeper.mkdir()
    shutil.copy(root / "train" / "apple" / "000.png", deeper / "100.png")
    data = load_dataset("folder", data_dir=root)
    assert torch.bincount(data.train.labels).tolist() == [9, 8, 8]


# -- sources and the loader ---------------------------------------------------------------------


def numbered(num: int) -> MemoryImages:
    """Image i is 2x2 pixels of value i."""
    values = np.arange(num, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    return MemoryImages.from_array(values, np.arange(num))


PLAIN = InputSpec((2, 2), 1, mean=(0.0,), std=(1.0,))


def test_epochs_are_permutations_that_differ_and_repeat() -> None:
    loader = ImageLoader(numbered(20), PLAIN, batch_size=6, device=CPU, shuffle=True, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        xs, ys = everything(loader, epoch)
        assert [len(y) for y in ys] == [6, 6, 6, 2]
        assert torch.equal((255 * torch.cat(xs)[:, 0, 0, 0]).round().long(), torch.cat(ys))
        orders.append(torch.cat(ys).tolist())
    assert sorted(orders[0]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]


def test_an_epoch_can_be_entered_in_the_middle() -> None:
    data = load_dataset("digits", augment="standard")
    loader = ImageLoader(
        data.train,
        data.inputs,
        batch_size=100,
        device=CPU,
        augmentation=data.augmentation,
        shuffle=True,
    )
    xs, ys = everything(loader, epoch=2)
    xs_late, ys_late = everything(loader, epoch=2, start=9)
    assert len(xs_late) == len(loader) - 9
    assert all(map(torch.equal, xs[9:], xs_late))
    assert all(map(torch.equal, ys[9:], ys_late))


@pytest.mark.parametrize(
    ("num", "batch_size", "shuffle", "sizes"),
    [
        (9, 4, True, [4, 4]),  # a last batch of one is no batch for BatchNorm
        (9, 4, False, [4, 4, 1]),  # but every test image counts
        (8, 4, True, [4, 4]),
        (3, 4, True, [3]),
        (1, 4, True, [1]),
    ],
)
def test_last_batch(num: int, batch_size: int, shuffle: bool, sizes: list[int]) -> None:
    loader = ImageLoader(numbered(num), PLAIN, batch_size=batch_size, device=CPU, shuffle=shuffle)
    assert [len(y) for y in everything(loader)[1]] == sizes
    assert len(loader) == len(sizes)
    assert loader.num_images == sum(sizes)


def test_subset_of_ragged_images() -> None:
    data = [np.full((h, w, 1), i, np.uint8) for i, (h, w) in enumerate([(2, 3), (4, 2), (1, 5)])]
    images = MemoryImages(
        torch.from_numpy(np.concatenate([d.reshape(-1, 1) for d in data])),
        torch.tensor([2, 4, 1]),
        torch.tensor([3, 2, 5]),
        torch.tensor([7, 8, 9]),
    )
    part = images.subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [9, 7]
    assert part.pixels[:, 0].tolist() == [2] * 5 + [0] * 6
    assert part.heights.tolist() == [1, 2]
    assert part.fingerprint() != images.fingerprint()


def test_prediction_sees_what_testing_sees(make_folder: MakeFolder) -> None:
    root = make_folder(sizes=((20, 30), (40, 18)), per_class=2)
    data = load_dataset("folder", data_dir=root, image_size=16)
    tested, _ = everything(ImageLoader(data.test, data.inputs, batch_size=6, device=CPU))
    paths = sorted((root / "test").rglob("*.png"))
    (seen,) = read_for_prediction(paths, data.inputs)
    torch.testing.assert_close(seen, tested[0])
    small = load_dataset("folder", data_dir=make_folder("equal"))
    shapes = [tuple(x.shape) for x in read_for_prediction(paths, small.inputs, batch_size=4)]
    assert shapes == [(4, 3, 12, 12), (2, 3, 12, 12)]
    with pytest.raises(UserError, match=r"no such image files: .*nothing.png"):
        list(read_for_prediction([root / "nothing.png"], data.inputs))


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (7, 7), (1, 30)])
def test_prediction_covers_the_crop_whatever_the_images_size(tmp_path: Path, size) -> None:
    inputs = InputSpec(size, 1, mean=(0.0,), std=(1.0,))
    paths = []
    for height, width in ((19, 31), (23, 38), (25, 40), (5, 5), (1, 9), (300, 7)):
        paths.append(tmp_path / f"{height}x{width}.png")
        Image.fromarray(np.full((height, width), 255, np.uint8)).save(paths[-1])
    (seen,) = read_for_prediction(paths, inputs)
    assert seen.shape == (6, 1, *size)
    torch.testing.assert_close(seen, torch.ones_like(seen))
