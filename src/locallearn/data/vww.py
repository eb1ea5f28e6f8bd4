"""`vww`, Visual Wake Words: is there a person in the picture?

Chowdhery et al., arXiv 1906.05721. COCO 2014's photographs; a photograph is of class 1, "person",
where the bounding box of a person (or of a crowd of people) covers more than 0.5 % of its area,
else of class 0. As the paper splits it, 8,059 images of val2014, the "minival" list of TensorFlow's
models, are the test part; the other 115,228 of train2014 and val2014 are trained on.

The box is what the paper's text says. The scripts that were published for it (TensorFlow's
build_visualwakewords_data, pyvww) compare COCO's "area" instead, that of the outline, which is
smaller: photographs whose people are small have the label 0 there and 1 here.

    DIR/
      train2014/*.jpg, val2014/*.jpg        the images (13.5 and 6.6 GB)
      annotations/instances_*2014.json      their boxes
      mscoco_minival_ids.txt                the test part's image ids, one a line

No checksum of the minival list is published with it: its size, the number of ids and that each is
an image of val2014 are verified instead. COCO's annotations are licensed under CC BY 4.0; each
photograph is under the terms that its author chose on Flickr (cocodataset.org/#termsofuse).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locallearn.data.augment import Augmentation
from locallearn.data.cache import ImageCache, digest_of_files
from locallearn.data.dataset import (
    Dataset,
    DatasetSpec,
    LoadRequest,
    default_data_dir,
    register_dataset,
)
from locallearn.data.decoding import ImageFiles, Listing
from locallearn.data.download import Archive, provide
from locallearn.data.folder import IMAGENET_MEAN, IMAGENET_STD, photo_recipes
from locallearn.data.images import InputSpec
from locallearn.data.listening import Work, telling
from locallearn.data.reading import some
from locallearn.errors import UserError

_COCO = "http://images.cocodataset.org"
TRAIN_IMAGES = Archive(
    f"{_COCO}/zips/train2014.zip",
    num_bytes=13_510_573_713,
    md5="0da8c0bd3d6becc4dcb32757491aca88",
    folder="train2014",
    unpacked_bytes=13_700_000_000,
)
VAL_IMAGES = Archive(
    f"{_COCO}/zips/val2014.zip",
    num_bytes=6_645_013_297,
    md5="a3d79f5ed8d289b7a7554ce06a5782b3",
    folder="val2014",
    unpacked_bytes=6_750_000_000,
)
ANNOTATIONS = Archive(
    f"{_COCO}/annotations/annotations_trainval2014.zip",
    num_bytes=252_872_794,
    md5="0a379cfc70b0e71301e0f377548639bd",
    folder="annotations",
    unpacked_bytes=850_000_000,
)
MINIVAL = Archive(
    "https://raw.githubusercontent.com/tensorflow/models/"
    "245f66dd6304869c082840dedce2f45c6af4e78f/"
    "research/object_detection/data/mscoco_minival_ids.txt",
    num_bytes=54_864,
    md5=None,
)
NUM_MINIVAL = 8_059

_CLASS_NAMES = ("no person", "person")
_MIN_AREA_SHARE = 0.005
_SIDE = 128


@dataclass(frozen=True)
class _Images:
    """The images of one annotation file: id -> (file name, label), by rising id."""

    folder: Path
    by_id: dict[int, tuple[str, int]]


def _load(request: LoadRequest) -> Dataset:
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "dataset 'vww' needs the package pycocotools: pip install 'locallearn[vww]'."
        )
    root = request.data_dir or default_data_dir()
    if root.is_file():
        raise UserError(f"--data-dir {root} is a file; give the directory that holds train2014.")
    # The small ones first: what is wrong with them is known before hours of download.
    archives = [MINIVAL, ANNOTATIONS, VAL_IMAGES, TRAIN_IMAGES]
    minival_path, annotations, val_folder, train_folder = provide(archives, root, request.listener)

    train = _read_annotations(annotations / "instances_train2014.json", train_folder, request)
    val = _read_annotations(annotations / "instances_val2014.json", val_folder, request)
    minival = _read_minival(minival_path, val)
    for images in (train, val):
        _check_files(images)
    train_part = _listing((train, train.by_id), (val, sorted(val.by_id.keys() - minival)))
    test_part = _listing((val, sorted(minival)))

    side = request.image_size or _SIDE
    resize, augmentation = _recipes(side)[request.augment or "basic"]
    notes: list[str] = []
    files = ImageFiles("vww", root, [train_part, test_part], request)
    train_source, test_source = files.decode(3, resize, notes)
    return Dataset(
        name="vww",
        class_names=_CLASS_NAMES,
        inputs=InputSpec((side, side), 3, resize, IMAGENET_MEAN, IMAGENET_STD),
        augmentation=augmentation,
        train=train_source,
        test=test_source,
        notes=tuple(notes),
    )


def _recipes(side: int) -> dict[str, tuple[int, Augmentation]]:
    """The paper trains with resize 132, random crop 128 and flip; there is nothing stronger."""
    recipes = photo_recipes(side)
    return {**recipes, "standard": recipes["basic"]}


def _listing(*parts: tuple[_Images, Iterable[int]]) -> Listing:
    """The images of these ids."""
    paths: list[Path] = []
    labels: list[int] = []
    for images, ids in parts:
        for number in ids:
            name, label = images.by_id[number]
            paths.append(images.folder / name)
            labels.append(label)
    return Listing(paths, torch.tensor(labels, dtype=torch.int64), _CLASS_NAMES)


def _read_annotations(path: Path, folder: Path, request: LoadRequest) -> _Images:
    """The images of a COCO file, by id, and their labels; from the cache where they are there.

    Raises:
        UserError: the file is missing, or as :func:`_label_images`.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing. Restore it, or remove {path.parent} to have it unpacked (or "
            f"downloaded) anew."
        )

    def make() -> list[Any]:
        work = Work("reading", path.name, "bytes", path.stat().st_size)
        with telling(request.listener, work):
            return _label_images(path)

    if request.cache is None:
        rows = make()
    else:
        digest = digest_of_files(path.parent, [path])
        cache = ImageCache(request.cache, "vww", path.parent, digest)
        rows = cache.rows(f"persons over {_MIN_AREA_SHARE}", make)
    return _Images(folder, {number: (name, label) for number, name, label in rows})


def _label_images(path: Path) -> list[Any]:
    """(id, file name, label) of each image of a COCO file, by rising id.

    An image's ``width`` and ``height`` and a box's [left, top, width, height] are in pixels.

    Raises:
        UserError: the file is truncated, of another kind, or knows no persons.
    """
    from pycocotools.coco import COCO

    restore = f"Remove {path.parent} to have it unpacked (or downloaded) anew."
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            coco = COCO(str(path))
        persons = {number for number, each in coco.cats.items() if each["name"] == "person"}
        rows: list[Any] = []
        for number in sorted(coco.imgs):
            image, annotations = coco.imgs[number], coco.imgToAnns.get(number, [])
            least = _MIN_AREA_SHARE * image["width"] * image["height"]
            boxes = [each["bbox"] for each in annotations if each["category_id"] in persons]
            label = any(width * height > least for _, _, width, height in boxes)
            rows.append((int(number), str(image["file_name"]), int(label)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is truncated or no JSON ({error}). {restore}") from error
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not COCO's annotations of objects. {restore}") from error
    if not persons:
        raise UserError(
            f"{path} has no category 'person', so nothing can be told from it; expected COCO's "
            f"instances. {restore}"
        )
    if not coco.imgs or not coco.anns:
        raise UserError(f"{path} is not COCO's annotations of objects: it has none. {restore}")
    return rows


def _read_minival(path: Path, val: _Images) -> set[int]:
    """The ids of the test part.

    Raises:
        UserError: not as many as published, or one that val2014 lacks.
    """
    lines = path.read_text(encoding="ascii", errors="replace").split()
    foreign = [line for line in lines if not line.isdigit()]
    if foreign:
        raise UserError(f"{path} holds what is no image id: {some(foreign)}. Remove it.")
    ids = {int(line) for line in lines}
    if len(ids) != NUM_MINIVAL:
        raise UserError(
            f"{path} holds {len(ids):,} image ids, expected {NUM_MINIVAL:,}. Remove it, and it is "
            f"downloaded anew."
        )
    unknown = sorted(ids - val.by_id.keys())
    if unknown:
        raise UserError(
            f"{path} holds ids that val2014's annotations lack: {some(unknown)}. Remove "
            f"whichever of the two is not the published file."
        )
    return ids


def _check_files(images: _Images) -> None:
    """Raises UserError that names the images that are not there."""
    found = set(os.listdir(images.folder))
    missing = [images.folder / name for name, _ in images.by_id.values() if name not in found]
    if missing:
        raise UserError(
            f"missing images: {some(missing)}. Restore them, or remove {images.folder} to have it "
            f"unpacked (or downloaded) anew."
        )


register_dataset(
    DatasetSpec(
        "vww",
        "123,287 COCO photos with or without a person, 128x128; 19 GiB to download (39 GiB on "
        "disk, unpacked)",
        _load,
        can_resize=True,
        can_cache=True,
    )
)
