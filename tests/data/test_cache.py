"""`--cache`: decoded once, and no difference in any bit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from locallearn import UserError
from locallearn.cli import main
from locallearn.data import (
    FileImages,
    ImageLoader,
    MappedImages,
    MemoryImages,
    cache,
    decoding,
    load_dataset,
    reading,
)
from locallearn.data.cache import digest_of_files

CPU = torch.device("cpu")
SIZES = ((20, 30), (40, 18), (16, 16))
MakeFolder = Callable[..., Path]


@pytest.fixture
def root(make_folder: MakeFolder) -> Path:
    return make_folder(sizes=SIZES, per_class=4)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(root: Path, place: Path | None, **more):
    return load_dataset("folder", data_dir=root, cache=place, **{"image_size": 16, **more})


def batches(data, part: str = "train", **more) -> list[torch.Tensor]:
    loader = ImageLoader(
        getattr(data, part),
        data.inputs,
        batch_size=5,
        device=CPU,
        augmentation=data.augmentation,
        **{"shuffle": True, "seed": 3, **more},
    )
    return [t for epoch in (0, 1) for batch in loader.epoch(epoch) for t in batch]


def forbid_reading(monkeypatch) -> None:
    def refuse(*arguments):
        raise AssertionError("an image file was opened")

    monkeypatch.setattr(Image, "open", refuse)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- no difference, and no decoding -------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "basic", "standard"])
@pytest.mark.parametrize("limit", [None, 0], ids=["memory", "mapped"])
def test_batches_are_the_same_to_the_bit(root, place, monkeypatch, augment, limit) -> None:
    plain = load(root, None, augment=augment, memory_limit_bytes=limit)
    made = load(root, place, augment=augment, memory_limit_bytes=limit)
    expected = [batches(plain, part) for part in ("train", "test")]
    assert isinstance(plain.train, MemoryImages if limit is None else FileImages)
    forbid_reading(monkeypatch)
    found = load(root, place, augment=augment, memory_limit_bytes=limit)
    for data in (made, found):
        assert isinstance(data.train, MemoryImages if limit is None else MappedImages)
        assert data.fingerprint() == plain.fingerprint()
        assert data.inputs == plain.inputs
        for part, batch in zip(("train", "test"), expected, strict=True):
            assert all(map(torch.equal, batch, batches(data, part)))


def test_equal_images_with_padding(make_folder: MakeFolder, place, monkeypatch) -> None:
    """Crops that reach over the edge; and mean and std, which are measured."""
    root = make_folder(per_class=6, mode="L")
    arguments = {"augment": "standard", "image_size": None, "val_split": 0.2, "limit_train": 15}
    for limit in (None, 0):
        arguments["memory_limit_bytes"] = limit
        plain = load(root, None, **arguments)
        expected = [batches(plain, part) for part in ("train", "val", "test")]
        load(root, place, **arguments)
        with monkeypatch.context() as context:
            forbid_reading(context)
            data = load(root, place, **arguments)
            assert data.inputs == plain.inputs
            assert data.fingerprint() == plain.fingerprint()
            for part, batch in zip(("train", "val", "test"), expected, strict=True):
                assert all(map(torch.equal, batch, batches(data, part)))
    assert len(names(place)) == 2  # one cache served both


def test_mapped_images_are_entered_in_the_middle(root, place) -> None:
    data = load(root, place, memory_limit_bytes=0)
    loader = ImageLoader(data.train, data.inputs, batch_size=2, device=CPU, shuffle=True)
    whole = [images for images, _ in loader.epoch(1)]
    late = [images for images, _ in loader.epoch(1, start=4)]
    assert len(whole) == 6
    assert all(map(torch.equal, whole[4:], late))
    epoch = loader.epoch(0)
    next(epoch)
    before = threading.active_count()
    epoch.close()  # what was being gathered ahead is given up
    assert threading.active_count() == before - 1
    assert "are read from" in data.notes[-1]


def test_what_lies_on_the_disk(root, place, listener) -> None:
    data = load(root, place, listener=listener)
    assert listener.verbs == ["decoding"]
    assert listener.done == [[24]]
    directory, headers = sorted(place.iterdir(), key=lambda path: path.is_file())
    assert json.loads(headers.read_text())["rows"][:2] == [[20, 30, False], [40, 18, False]]
    assert names(directory) == ["cache.json", "index.npy", "pixels.u8"]
    index = np.load(directory / "index.npy")
    sizes = torch.stack([data.train.heights, data.train.widths, data.train.labels], dim=1)
    assert index[:12].tolist() == sizes.tolist()
    pixels = np.fromfile(directory / "pixels.u8", np.uint8)
    split = data.train.pixels.numel()
    assert np.array_equal(pixels[:split], data.train.pixels.flatten().numpy())
    assert np.array_equal(pixels[split:], data.test.pixels.flatten().numpy())
    about = json.loads((directory / "cache.json").read_text())
    assert about == {
        "format": "locallearn-cache",
        "format_version": 1,
        "dataset": "folder",
        "made_from": str(root),
        "num_images": 24,
        "num_channels": 3,
        "resize": data.inputs.resize,
        "num_bytes": len(pixels),
    }
    load(root, place, listener=listener)
    assert listener.verbs == ["decoding"]


def test_worker_processes_decode_for_it(root, place, monkeypatch) -> None:
    plain = load(root, None)
    for name in ("MIN_FILES_FOR_WORKERS", "_CHUNK"):
        monkeypatch.setattr(reading, name, 5)
    monkeypatch.setattr(reading, "_MAX_WORKERS", 2)
    assert load(root, place).fingerprint() == plain.fingerprint()


def test_many_files_are_told_of_without_a_cache_too(root, listener, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "MIN_FILES_FOR_WORKERS", 10)
    load(root, None, listener=listener)
    assert [f"{work.verb} {work.what}" for work in listener.works] == [
        "reading the sizes of 24 images",
        "decoding 12 images",
        "decoding 12 images",
    ]


# -- what makes it another one ------------------------------------------------------------------


def test_the_key(root: Path) -> None:
    paths = sorted(root.rglob("*.png"))
    key = digest_of_files(root, paths)
    assert digest_of_files(root, paths) == key
    moved = root.with_name("moved")
    shutil.copytree(root, moved)
    assert digest_of_files(moved, sorted(moved.rglob("*.png"))) == key
    state = paths[3].stat()
    os.utime(paths[3], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert digest_of_files(root, paths) != key
    os.utime(paths[3], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest_of_files(root, paths) == key
    assert digest_of_files(root, paths[1:]) != key
    paths[3] = paths[3].rename(paths[3].with_name("new.png"))
    assert digest_of_files(root, paths) != key


def test_another_size_and_changed_files_are_another_cache(root, place) -> None:
    load(root, place)
    assert len(names(place)) == 2
    load(root, place, augment="standard")  # another resize
    assert len(names(place)) == 3
    (root / "train" / "apple" / "000.png").write_bytes((root / "test/pear/001.png").read_bytes())
    assert load(root, place).fingerprint() == load(root, None).fingerprint()
    assert len(names(place)) == 5


# -- what goes wrong ----------------------------------------------------------------------------


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def save(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


OTHER = '{"format": "locallearn-cache", "format_version": 2, "num_channels": 3, "resize": 16}'

DAMAGE = [
    ("pixels.u8", halve, r"pixels.u8 has [\d,]+ bytes, expected [\d,]+"),
    ("pixels.u8", Path.unlink, r"pixels.u8 is missing"),
    ("index.npy", halve, r"index.npy can't be read"),
    ("index.npy", write(""), r"index.npy can't be read"),
    ("index.npy", save(np.zeros((3, 3), int)), r"index.npy holds something else"),
    ("index.npy", save(np.zeros((24, 3))), r"index.npy holds something else"),
    ("index.npy", save(np.full((24, 3), 9)), r"index.npy holds other labels"),
    ("index.npy", Path.unlink, r"index.npy is missing"),
    ("cache.json", halve, r"cache.json can't be read"),
    ("cache.json", write("{}"), r"cache.json can't be read"),
    ("cache.json", write("[]"), r"cache.json can't be read"),
    ("cache.json", write(OTHER), r"cache.json is of another version"),
    ("cache.json", write(OTHER.replace("2", "1").replace("16", "9")), r"cache.json tells another"),
    ("cache.json", Path.unlink, r"cache.json is missing"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_cache_is_one_line(root, place, name, damage, message) -> None:
    load(root, place)
    (directory,) = (path for path in place.iterdir() if path.is_dir())
    damage(directory / name)
    with pytest.raises(UserError, match=message) as error:
        load(root, place)
    line = str(error.value)
    assert line.startswith(f"the cache {directory} is damaged (")
    assert line.endswith("). Delete that directory; it is made anew.")
    assert "\n" not in line
    shutil.rmtree(directory)
    load(root, place)


@pytest.mark.parametrize("damage", [halve, write('{"num_rows": 2, "rows": []}'), write("[]")])
def test_damaged_headers_are_one_line(root, place, damage) -> None:
    load(root, place)
    (path,) = place.glob("*.json")
    damage(path)
    with pytest.raises(UserError, match=r"json is damaged \(.*\). Delete that file; it is made an"):
        load(root, place)


def test_broken_images_leave_no_cache(root, place, listener) -> None:
    path = root / "train" / "pear" / "002.png"
    path.write_bytes(path.read_bytes()[:100])  # the header is whole
    with pytest.raises(UserError, match=r"unreadable images: .*pear/002.png. Remove or replace"):
        load(root, place, listener=listener)
    assert all(name.endswith(".json") for name in names(place))
    assert [type(error) for error in listener.errors] == [UserError]


def test_an_interrupted_one_leaves_nothing(root, place, interrupting) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(root, place, listener=interrupting("decoding", 1))
    assert all(name.endswith(".json") for name in names(place))


def test_what_killed_processes_left_is_removed(root, place) -> None:
    dead, alive, whole, other = (
        place / f".{name}.tmp" for name in ("folder-1.ab", "folder-2.ab", "folder-3.ab", "vww-1.ab")
    )
    for each in (dead, alive, whole, other):
        each.mkdir(parents=True)
        (each / "pixels.u8").write_bytes(b"begun")
    (whole / "cache.json").write_text("{}")
    with open(alive / "pixels.u8", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load(root, place)
    assert [each.exists() for each in (dead, alive, whole, other)] == [False, True, True, True]


def test_one_that_is_being_made_is_not_taken_for_abandoned(root, place, make_listener) -> None:
    """Two datasets of one name, the second begun while the first is decoding."""
    found = []

    def load_another(work, done: int) -> None:
        found.append(load(root, place, augment="standard"))

    first = load(root, place, listener=make_listener(load_another))
    assert first.fingerprint() == load(root, None).fingerprint()
    assert found[0].fingerprint() == load(root, None, augment="standard").fingerprint()
    assert not [name for name in names(place) if name.startswith(".")]


def test_large_images_are_decoded_a_few_at_a_time(root, place, monkeypatch, listener) -> None:
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 10_000)
    assert load(root, place, listener=listener).fingerprint() == load(root, None).fingerprint()
    (done,) = listener.done
    assert 2 < len(done) < 24
    assert done[-1] == 24


def test_a_cache_that_is_cut_off_while_it_is_in_use(root, place) -> None:
    data = load(root, place, memory_limit_bytes=0)
    os.truncate(data.train.path, 100)
    with pytest.raises(UserError, match=r"pixels.u8 was cut off meanwhile"):
        data.train.read()


def test_two_processes_make_the_same_one(root, place, monkeypatch) -> None:
    """The other is faster: its cache appears while ours is being decoded."""
    other = place.with_name("other")
    load(root, other)
    before = cache.read_chunks

    def slow(*arguments):
        yield from before(*arguments)
        shutil.copytree(other, place, dirs_exist_ok=True)

    monkeypatch.setattr(cache, "read_chunks", slow)
    data = load(root, place)
    assert data.fingerprint() == load(root, None).fingerprint()
    assert names(place) == names(other)  # and ours is gone


def test_too_little_disk_space(root, place, monkeypatch) -> None:
    usage = shutil.disk_usage(root)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"the cache of folder needs .* KiB in .*cache, where 10 Ki"
    ):
        load(root, place)


def test_where_it_can_not_be(root, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--cache .*file is a file; give a directory"):
        load(root, tmp_path / "file")
    with pytest.raises(UserError, match=r"lies in the data directory .*, where it would be taken"):
        load(root, root / "cache")
    with pytest.raises(UserError, match=r"'digits' is not made of image files; leave out --cache"):
        load_dataset("digits", cache=tmp_path / "cache")
    assert names(tmp_path) == ["data", "file"]


# -- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [2**33, 0], ids=["memory", "mapped"])
def test_a_run_may_change_its_cache(make_folder, tmp_path, monkeypatch, capsys, free) -> None:
    """Trained without, resumed with, evaluated with: always the same numbers."""
    monkeypatch.setattr("locallearn.engine.building.free_memory_bytes", lambda: free)
    from locallearn.cli.console import QuietObserver
    from locallearn.engine import Interrupted, TrainConfig, Trainer

    monkeypatch.chdir(tmp_path)
    settings = {"dataset": "folder", "data_dir": str(make_folder()), "epochs": 2, "batch_size": 8}
    weights = []
    for name, places in {
        "without": (None, None),
        "late": (None, "cache"),
        "moved": ("cache", "cache2"),
        "off": ("cache", ""),
    }.items():
        trainer = Trainer.start(
            TrainConfig(**settings, cache=places[0]), Path(name), QuietObserver()
        )
        trainer.request_stop(2)
        with pytest.raises(Interrupted):
            trainer.fit()
        given = {} if places[1] is None else {"cache": places[1]}
        Trainer.resume(Path(name), QuietObserver(), given).fit()
        weights.append(load_file(Path(name, "model.safetensors")))
    for other in weights[1:]:
        assert all(torch.equal(other[key], weights[0][key]) for key in other)
    saved = json.loads(Path("moved/config.json").read_text())
    assert saved["data"]["in_memory"] == (free > 0)
    assert saved["settings"]["cache"] == str(tmp_path / "cache")
    assert names(Path("cache")) == names(Path("cache2"))
    shutil.rmtree("cache2")

    outputs = []
    for arguments in (["without"], ["moved"], ["moved", "--cache", ""]):
        assert main(["evaluate", *arguments]) == 0
        outputs.append(capsys.readouterr().out.split(": ", 1)[1])
    assert outputs[0] == outputs[1] == outputs[2]
    assert main(["evaluate", "without", "--cache", "cache2"]) == 0
    assert capsys.readouterr().out.startswith("decoding 48 images (20 KiB) to cache2\nwithout/")
