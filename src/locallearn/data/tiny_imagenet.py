"""`tiny-imagenet`: 200 classes of ImageNet at 64x64, from Stanford's archive.

    tiny-imagenet-200/
      wnids.txt                             the classes, a WordNet id a line
      words.txt                             id, tab, the words for it, with commas between
      train/WNID/images/*.JPEG              500 of each class
      train/WNID/WNID_boxes.txt             file, tab, box: names the images that are to be there
      val/images/*.JPEG                     10,000, here the test part
      val/val_annotations.txt               file, tab, WNID, tab, box

The archive's own test part has no labels, and is not used. The images are ImageNet's, for
non-commercial research and education (image-net.org/download).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from locallearn.data.augment import Augmentation
from locallearn.data.dataset import (
    Dataset,
    DatasetSpec,
    LoadRequest,
    default_data_dir,
    register_dataset,
)
from locallearn.data.decoding import ImageFiles, Listing
from locallearn.data.download import Archive, provide
from locallearn.data.folder import IMAGENET_MEAN, IMAGENET_STD
from locallearn.data.images import InputSpec
from locallearn.data.reading import some
from locallearn.errors import UserError

_FOLDER = "tiny-imagenet-200"
ARCHIVE = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    num_bytes=248_100_043,
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    folder=_FOLDER,
    unpacked_bytes=520_000_000,  # 120,000 small files, each in whole blocks of the disk
)
_SIDE = 64
_RESTORE = f"Restore them, or remove {_FOLDER} to have it unpacked (or downloaded) anew."

# The paper's for TinyImageNet is "standard".
_RECIPES = {
    "none": Augmentation(),
    "basic": Augmentation(flip=True),
    "standard": Augmentation(flip=True, erase_probability=0.2),
}


def _load(request: LoadRequest) -> Dataset:
    root = _find_root(request)
    wnids = sorted(set(_read_lines(root / "wnids.txt")))
    names = _class_names(root, wnids)
    train, test = _list_train(root, wnids, names), _list_test(root, wnids, names)
    files = ImageFiles("tiny-imagenet", root, [train, test], request)
    odd = [
        path
        for path, header in zip(files.paths, files.headers, strict=True)
        if (header.height, header.width) != (_SIDE, _SIDE)
    ]
    if odd:
        raise UserError(f"images that are not {_SIDE}x{_SIDE} pixels: {some(odd)}. {_RESTORE}")
    notes: list[str] = []
    train_source, test_source = files.decode(3, None, notes)
    return Dataset(
        name="tiny-imagenet",
        class_names=names,
        inputs=InputSpec((_SIDE, _SIDE), 3, None, IMAGENET_MEAN, IMAGENET_STD),
        augmentation=_RECIPES[request.augment or "basic"],
        train=train_source,
        test=test_source,
        notes=tuple(notes),
    )


def _find_root(request: LoadRequest) -> Path:
    """The folder itself, which may be what was given, or lie in it, or come to."""
    given = request.data_dir or default_data_dir()
    if given.is_file():
        raise UserError(f"--data-dir {given} is a file; give the directory that holds it.")
    if (given / "wnids.txt").is_file() or (given.name == _FOLDER and (given / "train").is_dir()):
        return given
    return provide([ARCHIVE], given, request.listener)[0]


def _list_train(root: Path, wnids: list[str], names: tuple[str, ...]) -> Listing:
    folders = [root / "train" / wnid / "images" for wnid in wnids]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(f"class folders of wnids.txt that are missing: {some(missing)}. {_RESTORE}")
    paths: list[Path] = []
    labels: list[int] = []
    absent: list[Path] = []
    for label, (wnid, folder) in enumerate(zip(wnids, folders, strict=True)):
        found = _images_in(folder)
        boxes = folder.parent / f"{wnid}_boxes.txt"
        # Copies of the data set without the box files go around: they are taken as they are.
        expected = {line.split("\t")[0] for line in _read_lines(boxes)} if boxes.exists() else found
        absent += [folder / name for name in sorted(expected - found)]
        if not found:
            raise UserError(f"{folder} holds no images. {_RESTORE}")
        paths += [folder / name for name in sorted(found)]
        labels += [label] * len(found)
    if absent:
        raise UserError(f"missing images: {some(absent)}. {_RESTORE}")
    return Listing(paths, torch.tensor(labels), names)


def _list_test(root: Path, wnids: list[str], names: tuple[str, ...]) -> Listing:
    annotations, folder = root / "val" / "val_annotations.txt", root / "val" / "images"
    number = {wnid: label for label, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for line_number, line in enumerate(_read_lines(annotations), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise UserError(
                f"{annotations}, line {line_number}: expected a file, a tab and a class of "
                f"wnids.txt, got {line[:60]!r}. {_RESTORE}"
            )
        labels[fields[0]] = number[fields[1]]
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. {_RESTORE}")
    found = _images_in(folder)
    absent = [folder / name for name in sorted(set(labels) - found)]
    if absent:
        raise UserError(f"missing images: {some(absent)}. {_RESTORE}")
    unlabelled = [folder / name for name in sorted(found - set(labels))]
    if unlabelled:
        raise UserError(f"images that {annotations} lacks: {some(unlabelled)}. {_RESTORE}")
    order = sorted(labels)
    return Listing(
        [folder / name for name in order], torch.tensor([labels[n] for n in order]), names
    )


def _images_in(folder: Path) -> set[str]:
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return {name for name in names if name.lower().endswith((".jpeg", ".jpg"))}


def _class_names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class; with the WordNet id where two classes share it."""
    words = dict(line.split("\t", 1) for line in _read_lines(root / "words.txt") if "\t" in line)
    unknown = [wnid for wnid in wnids if wnid not in words]
    if unknown:
        raise UserError(f"classes that {root / 'words.txt'} lacks: {some(unknown)}. {_RESTORE}")
    first = [words[wnid].split(",")[0].strip() for wnid in wnids]
    count = Counter(first)
    return tuple(
        f"{word} ({wnid})" if count[word] > 1 else word
        for word, wnid in zip(first, wnids, strict=True)
    )


def _read_lines(path: Path) -> list[str]:
    """A text file's lines that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. {_RESTORE}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file. {_RESTORE}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty. {_RESTORE}")
    return lines


register_dataset(
    DatasetSpec(
        "tiny-imagenet",
        "110,000 64x64 photos of 200 ImageNet classes; 237 MiB to download",
        _load,
        can_cache=True,
    )
)
