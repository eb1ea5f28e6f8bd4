"""`vww`, from small archives of COCO's format."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from locallearn import UserError
from locallearn.data import Augmentation, load_dataset, vww

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def load(place: Path, **arguments):
    return load_dataset("vww", data_dir=place, **{"image_size": 16, **arguments})


def box(image: int, number: int, width: float, height: float, category: int = 1, crowd: int = 0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [1.0, 2.0, width, height],
        "iscrowd": crowd,
        "area": 1.0,  # of the outline, which is not what counts
    }


def instances(part: str, numbers: list[int], boxes: list[dict]) -> dict:
    images = [
        {"id": n, "file_name": f"COCO_{part}_{n:012d}.jpg", "height": 20, "width": 40}
        for n in numbers
    ]
    return {"info": {}, "images": images, "annotations": boxes, "categories": CATEGORIES}


# An image has 800 pixels: a box must have more than 4.
TRAIN = instances(
    "train2014",
    [9, 3, 5, 7, 8],
    [
        box(3, 1, 2.0, 2.0),  # 0.5 % exactly: too small
        box(5, 2, 2.0, 2.01),
        box(7, 3, 30.0, 15.0, category=18),  # a dog
        box(8, 4, 1.0, 1.0),
        box(8, 5, 20.0, 10.0, crowd=1),
        # 9 has none
    ],
)
VAL = instances(
    "val2014", [11, 12, 13, 14], [box(12, 1, 9.0, 9.0), box(13, 2, 9.0, 9.0), box(14, 3, 1.0, 1.0)]
)


@pytest.fixture
def root(tmp_path: Path, make_jpeg, monkeypatch) -> Path:
    place = tmp_path / "coco"
    (place / "annotations").mkdir(parents=True)
    for part, content in (("train2014", TRAIN), ("val2014", VAL)):
        (place / part).mkdir()
        (place / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for image in content["images"]:
            (place / part / image["file_name"]).write_bytes(make_jpeg(20, 40, 10 * image["id"]))
    minival = place / "mscoco_minival_ids.txt"
    minival.write_text("14\n12\n")
    monkeypatch.setattr(vww, "NUM_MINIVAL", 2)
    monkeypatch.setattr(
        vww, "MINIVAL", vww.Archive("http://127.0.0.1:1/mscoco_minival_ids.txt", 6, None)
    )
    return place


def test_labels_and_split(root: Path, capfd) -> None:
    data = load(root)
    assert data.class_names == ("no person", "person")
    # train2014's 3, 5, 7, 8, 9, then val2014's 11 and 13; minival is 12 and 14.
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert data.test.labels.tolist() == [1, 0]
    means = [part.double().mean() for part in data.train.pixels.split(17 * 34)]
    assert means == sorted(means)  # the image of id n is as bright as 10 n
    assert data.inputs.mean == (0.485, 0.456, 0.406)
    assert data.notes == ()
    assert capfd.readouterr() == ("", "")  # pycocotools would print


def test_with_a_cache_annotations_are_read_once(root: Path, tmp_path: Path, listener) -> None:
    plain = load(root)
    for _ in range(2):
        data = load(root, cache=tmp_path / "cache", listener=listener)
        assert data.fingerprint() == plain.fingerprint()
    assert listener.verbs == ["reading", "reading", "decoding"]
    edit("train2014", lambda content: content["annotations"].pop(1))(root)
    changed = load(root, cache=tmp_path / "cache")
    assert changed.train.labels.tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert changed.fingerprint() == load(root).fingerprint()


def test_recipes_are_the_papers(root: Path) -> None:
    crop_and_flip = Augmentation(random_crop=True, flip=True)
    for augment, resize, recipe in (
        ("none", 128, Augmentation()),
        ("basic", 132, crop_and_flip),
        ("standard", 132, crop_and_flip),
    ):
        data = load(root, augment=augment, image_size=None)
        assert data.inputs.resize == resize
        assert data.inputs.image_size == (128, 128)
        assert data.augmentation == recipe


def test_what_is_missing_is_downloaded(
    root: Path, tmp_path: Path, server, make_zip, listener, monkeypatch
) -> None:
    for name, folder in (
        ("TRAIN_IMAGES", "train2014"),
        ("VAL_IMAGES", "val2014"),
        ("ANNOTATIONS", "annotations"),
    ):
        files = {f"{folder}/{p.name}": p.read_bytes() for p in (root / folder).iterdir()}
        archive = server.archive(f"{name}.zip", make_zip(files), folder=folder)
        monkeypatch.setattr(vww, name, archive)
    minival = (root / "mscoco_minival_ids.txt").read_bytes()
    archive = server.archive("mscoco_minival_ids.txt", minival, md5=None)
    monkeypatch.setattr(vww, "MINIVAL", archive)
    whole = load(root)
    shutil.rmtree(root / "annotations")
    again = load(root, listener=listener)
    assert [path for path, _ in server.asked] == ["/ANNOTATIONS.zip"]
    assert listener.verbs == ["downloading", "checking", "unpacking", "reading", "reading"]
    new = load(tmp_path / "new")
    assert len(server.asked) == 5
    assert whole.fingerprint() == again.fingerprint() == new.fingerprint()


def edit(part: str, change):
    def apply(root: Path) -> None:
        path = root / "annotations" / f"instances_{part}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def text(name: str, content: str):
    return lambda root: (root / name).write_text(content)


def cut(root: Path) -> None:
    path = root / "annotations" / "instances_train2014.json"
    path.write_text(path.read_text()[:-30])


def drop_images(root: Path) -> None:
    for number in (5, 9):
        (root / "train2014" / f"COCO_train2014_{number:012d}.jpg").unlink()


DAMAGE = [
    (
        edit("train2014", lambda content: content["categories"].pop(0)),
        r"instances_train2014.json has no category 'person', so nothing can be told from it; expec",
    ),
    (drop_images, r"missing images: .*_000000000005.jpg, .*_000000000009.jpg. Restore them, or re"),
    (
        text("val2014/COCO_val2014_000000000013.jpg", "broken"),
        r"unreadable images: .*COCO_val2014_000000000013.jpg. Remove or replace",
    ),
    (cut, r"instances_train2014.json is truncated or no JSON \(.*\). Remove .*annotations to have"),
    (text("annotations/instances_val2014.json", "[1, 2]"), r"val2014.json is not COCO's annotatio"),
    (text("annotations/instances_val2014.json", "{}"), r"val2014.json has no category 'person'"),
    (
        edit("val2014", lambda content: content.pop("annotations")),
        r"instances_val2014.json is not COCO's annotations of objects",
    ),
    (
        edit("val2014", lambda content: content["annotations"][0].pop("bbox")),
        r"instances_val2014.json is not COCO's annotations of objects",
    ),
    (
        lambda root: (root / "annotations" / "instances_val2014.json").unlink(),
        r"instances_val2014.json is missing. Restore it, or remove",
    ),
    (text("mscoco_minival_ids.txt", "12\n99\n"), r"holds ids that val2014's annotations lack: 99"),
    (text("mscoco_minival_ids.txt", "12\n12\n"), r"holds 1 image ids, expected 2. Remove it, and"),
    (text("mscoco_minival_ids.txt", "12\nxx\n"), r"holds what is no image id: xx. Remove it"),
    (text("mscoco_minival_ids.txt", "12\n"), r"has 3 bytes, expected 6: it is incomplete or anoth"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_is_missing_or_broken_is_named(root: Path, damage, message: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_without_pycocotools(root: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        UserError, match=r"needs the package pycocotools: pip install 'locallearn\["
    ):
        load(root)


def test_a_directory_is_expected(root: Path) -> None:
    with pytest.raises(UserError, match=r"--data-dir .*ids.txt is a file; give the directory"):
        load(root / "mscoco_minival_ids.txt")
