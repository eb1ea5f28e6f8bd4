"""`folder`: any directory of class folders, and the recipes that other file datasets share."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from locallearn.data.augment import Augmentation
from locallearn.data.dataset import (
    DATA_SEED,
    Dataset,
    DatasetSpec,
    LoadRequest,
    register_dataset,
    stratified_split,
)
from locallearn.data.decoding import ImageFiles, Listing
from locallearn.data.images import InputSpec
from locallearn.data.reading import IMAGE_SUFFIXES, some
from locallearn.errors import UserError

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_TEST_SHARE = 0.2  # held out as the test part of a folder that has none
_IGNORED_FILES = frozenset({"thumbs.db", "desktop.ini"})

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# For images without a common size, as the authors train Imagenette: crops of 128, from images
# whose shorter side is 132 ("basic") or 160 ("standard").
_PHOTO_SIZE = 128
_PHOTO_RESIZE = {"none": 128, "basic": 132, "standard": 160}


def photo_recipes(image_size: int) -> dict[str, tuple[int, Augmentation]]:
    """Recipe name -> (resize of the shorter side, augmentation), for photographs."""
    resize = {name: round(image_size * r / _PHOTO_SIZE) for name, r in _PHOTO_RESIZE.items()}
    return {
        "none": (resize["none"], Augmentation()),
        "basic": (resize["basic"], Augmentation(random_crop=True, flip=True)),
        "standard": (
            resize["standard"],
            Augmentation(random_crop=True, flip=True, erase_probability=0.2),
        ),
    }


def small_image_recipes(image_size: tuple[int, int]) -> dict[str, Augmentation]:
    """Recipe name -> augmentation for equal-sized small images, as the authors train CIFAR."""
    return {
        "none": Augmentation(),
        "basic": Augmentation(flip=True),
        "standard": Augmentation(
            pad=max(1, min(image_size) // 8), random_crop=True, flip=True, erase_probability=0.2
        ),
    }


def load_folder(request: LoadRequest) -> Dataset:
    """``DIR/train/CLASS/*`` and ``DIR/test/CLASS/*`` (or val), or ``DIR/CLASS/*`` alone.

    A directory without a test part has a fifth of each class held out for it. Images of one
    common size are taken as they are; others are scaled (see :func:`photo_recipes`).
    """
    assert request.data_dir is not None
    root, cache = request.data_dir, request.cache
    if cache is not None and cache.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"--cache {cache} lies in the data directory {root}, where it would be taken for a "
            f"class; put it elsewhere."
        )
    train, test, notes = _find_parts(root)
    files = ImageFiles("folder", root, [train, test], request)
    sizes = Counter((h.height, h.width) for h in files.headers)
    num_channels = 1 if all(h.is_gray for h in files.headers) else 3
    augment = request.augment or "basic"

    resize: int | None
    view = request.view
    if view is not None:
        num_channels, image_size = view.num_channels, view.image_size
        resize, augmentation = _seen_as(view, set(sizes), augment)
    elif request.image_size is None and len(sizes) == 1:
        resize, image_size = None, next(iter(sizes))
        augmentation = small_image_recipes(image_size)[augment]
    else:
        side = request.image_size or _PHOTO_SIZE
        image_size = (side, side)
        resize, augmentation = photo_recipes(side)[augment]
        if request.image_size is None:
            notes.append(
                f"images of {len(sizes)} sizes are scaled to {resize} pixels (shorter side) and "
                f"cropped to {side}x{side}; --image-size chooses another size"
            )
    sources = files.decode(num_channels, resize, notes)
    return Dataset(
        name="folder",
        class_names=train.class_names,
        inputs=InputSpec(image_size, num_channels, resize),
        augmentation=augmentation,
        train=sources[0],
        test=sources[1],
        notes=tuple(notes),
    )


def _seen_as(
    view: InputSpec, sizes: set[tuple[int, int]], augment: str
) -> tuple[int | None, Augmentation]:
    """Resize and augmentation with which a trained network sees the images as it is used to.

    Arguments:
        view: what it sees.
        sizes: (H, W) of the images there are.
        augment: name of a recipe.

    Raises:
        UserError: images of several shapes, for a network that sees oblong ones.
    """
    if view.resize is None and sizes == {view.image_size}:
        return None, small_image_recipes(view.image_size)[augment]
    height, width = view.image_size
    if height != width:
        raise UserError(
            f"the network sees images of {height}x{width} pixels, and these are of other sizes; "
            f"only to squares are images scaled. Scale them to {height}x{width} yourself."
        )
    resize, augmentation = photo_recipes(height)[augment]
    return view.resize or resize, augmentation


register_dataset(
    DatasetSpec(
        "folder",
        "your own images: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*",
        load_folder,
        needs_data_dir=True,
        can_resize=True,
        can_cache=True,
    )
)


def _find_parts(root: Path) -> tuple[Listing, Listing, list[str]]:
    if not root.is_dir():
        raise UserError(f"data directory {root} does not exist or is no directory.")
    notes: list[str] = []
    if (root / "train").is_dir():
        train = list_class_folders(root / "train")
        found = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
        if found:
            test = list_class_folders(root / found[0])
            extra = sorted(set(test.class_names) - set(train.class_names))
            if extra:
                raise UserError(
                    f"{root / found[0]} has classes that {root / 'train'} lacks: "
                    f"{some(extra)}. Every test class needs training images."
                )
            number = {name: i for i, name in enumerate(train.class_names)}
            relabel = torch.tensor([number[name] for name in test.class_names])
            test = replace(test, labels=relabel[test.labels], class_names=train.class_names)
            return train, test, notes
        everything = train
    else:
        everything = list_class_folders(root)
    kept, held = stratified_split(everything.labels, _TEST_SHARE, DATA_SEED)
    if len(held) == 0:
        raise UserError(
            f"{root} has no test folder and too few images for one to be held out; "
            f"add {root}/train and {root}/test."
        )
    notes.append(
        f"no test folder in {root}: a fifth of each class ({len(held)} images) is held out for it"
    )
    return _pick(everything, kept), _pick(everything, held), notes


def _pick(listing: Listing, indices: Tensor) -> Listing:
    paths = [listing.paths[i] for i in indices.tolist()]
    return replace(listing, paths=paths, labels=listing.labels[indices])


def list_class_folders(root: Path) -> Listing:
    """The images below each class folder of ``root``, in sorted order.

    Raises:
        UserError: no class folders, one only, a class folder without images, a file that is no
            image, an image that lies in no class folder.
    """
    entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    folders = [p for p in entries if p.is_dir()]
    stray = [p for p in entries if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    if not folders:
        raise UserError(
            f"{root} holds no class folders; expected {root}/CLASS/IMAGE, one folder a class."
        )
    if stray:
        raise UserError(f"images that lie in no class folder of {root}: {some(stray)}.")
    if len(folders) == 1:
        raise UserError(
            f"{root} has one class only ({folders[0].name!r}); at least two are needed."
        )
    paths: list[Path] = []
    labels: list[int] = []
    foreign: list[Path] = []
    empty: list[str] = []
    for label, folder in enumerate(folders):
        images: list[Path] = []
        for directory, subfolders, files in os.walk(folder, followlinks=True):
            subfolders.sort()
            place = Path(directory)
            for name in sorted(files):
                if name.startswith(".") or name.lower() in _IGNORED_FILES:
                    continue
                is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                (images if is_image else foreign).append(place / name)
        if not images:
            empty.append(folder.name)
        paths += images
        labels += [label] * len(images)
    if foreign:
        raise UserError(f"files that are no images among the classes of {root}: {some(foreign)}.")
    if empty:
        raise UserError(f"class folders without images in {root}: {some(empty)}.")
    return Listing(paths, torch.tensor(labels), tuple(folder.name for folder in folders))
