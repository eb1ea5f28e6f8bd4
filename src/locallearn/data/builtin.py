"""The named datasets: scikit-learn's digits, which needs no download, and torchvision's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from locallearn.data.augment import Augmentation
from locallearn.data.dataset import (
    DATA_SEED,
    Dataset,
    DatasetSpec,
    LoadRequest,
    default_data_dir,
    register_dataset,
    stratified_split,
)
from locallearn.data.decoding import ImageFiles, Listing
from locallearn.data.folder import IMAGENET_MEAN, IMAGENET_STD, photo_recipes
from locallearn.data.folder import small_image_recipes as cifar_recipes
from locallearn.data.images import InputSpec, MemoryImages
from locallearn.errors import UserError

_DIGITS_TEST_SHARE = 0.2
_DIGITS_MAX = 16  # scikit-learn's pixel values run from 0 to 16


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8), from 0 to 16, and (1797,) labels.

    From scikit-learn's own file where that lies as ever: importing scikit-learn takes 2 s.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    if path.exists():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


def _load_digits(request: LoadRequest) -> Dataset:
    images, labels = _read_digits()
    pixels = np.round(images * (255 / _DIGITS_MAX)).astype(np.uint8)
    everything = MemoryImages.from_array(pixels, labels)
    train, test = stratified_split(everything.labels, _DIGITS_TEST_SHARE, DATA_SEED)
    recipes = {
        "none": Augmentation(),
        "basic": Augmentation(pad=1, random_crop=True),
        "standard": Augmentation(pad=1, random_crop=True, erase_probability=0.2),
    }
    return Dataset(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        inputs=InputSpec((8, 8), 1),
        augmentation=recipes[request.augment or "none"],
        train=everything.subset(train),
        test=everything.subset(test),
    )


@dataclass(frozen=True)
class _InMemory:
    """A torchvision dataset that is decoded as a whole: how to open it, and its constants."""

    name: str
    torchvision_class: str
    inputs: InputSpec
    recipes: dict[str, Augmentation]

    def load(self, request: LoadRequest) -> Dataset:
        import torchvision

        cls = getattr(torchvision.datasets, self.torchvision_class)

        def open_part(is_train: bool) -> Any:
            return _fetch(self.name, request, lambda root: cls(root, is_train, download=True))

        parts = [open_part(True), open_part(False)]
        train, test = (
            MemoryImages.from_array(part.data, torch.as_tensor(part.targets)) for part in parts
        )
        return Dataset(
            name=self.name,
            class_names=tuple(parts[0].classes),
            inputs=self.inputs,
            augmentation=self.recipes[request.augment or "basic"],
            train=train,
            test=test,
        )


def _load_imagenette(request: LoadRequest) -> Dataset:
    from torchvision.datasets import Imagenette

    side = 128
    resize, augmentation = photo_recipes(side)[request.augment or "basic"]

    def open_part(split: str) -> Any:
        return _fetch(
            "imagenette",
            request,
            # torchvision refuses to download over what is there already.
            lambda root: Imagenette(
                root, split=split, size="160px", download=not (root / "imagenette2-160").is_dir()
            ),
        )

    parts = [open_part("train"), open_part("val")]
    class_names = tuple(names[0] for names in parts[0].classes)
    listings = [
        Listing(
            [Path(p) for p, _ in part._samples],
            torch.tensor([y for _, y in part._samples]),
            class_names,
        )
        for part in parts
    ]
    notes: list[str] = []
    root = request.data_dir or default_data_dir()
    train, test = ImageFiles("imagenette", root, listings, request).decode(3, resize, notes)
    return Dataset(
        name="imagenette",
        class_names=class_names,
        inputs=InputSpec((side, side), 3, resize, IMAGENET_MEAN, IMAGENET_STD),
        augmentation=augmentation,
        train=train,
        test=test,
        notes=tuple(notes),
    )


def _fetch(name: str, request: LoadRequest, open_dataset: Callable[[Path], Any]) -> Any:
    """Open a torchvision dataset, downloading it where it is not there.

    Raises:
        UserError: it can't be downloaded, or what is there is broken. Directories that the
            attempt made are removed again where they are empty.
    """
    root = request.data_dir or default_data_dir()
    before = _directories(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision prints its failures; here they become the error. Its progress bar, on
        # standard error, stays.
        with contextlib.redirect_stdout(io.StringIO()):
            return open_dataset(root)
    except Exception as error:  # whatever a broken or foreign file makes its reader raise
        for directory in sorted(_directories(root) - before, reverse=True):
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"dataset {name!r} can neither be read from {root} nor be downloaded to it "
            f"({reason}). Give --data-dir the directory that holds it, or connect to the network."
        ) from error


def _directories(root: Path) -> set[Path]:
    """``root`` and what torchvision may make below it (NAME and NAME/raw), where they exist."""
    places = [root, *root.glob("*"), *root.glob("*/raw")]
    return {place for place in places if place.is_dir()}


_MNIST_RECIPE = Augmentation(pad=4, random_crop=True)
_FASHION_RECIPE = Augmentation(pad=4, random_crop=True, flip=True)
_CIFAR_INPUTS = InputSpec((32, 32), 3, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))

register_dataset(
    DatasetSpec("digits", "1,797 8x8 digits of scikit-learn; nothing to download", _load_digits)
)
register_dataset(
    DatasetSpec(
        "imagenette",
        "13,394 photos of 10 ImageNet classes, 128x128, downloaded",
        _load_imagenette,
        can_cache=True,
    )
)
for _summary, _dataset in (
    (
        "70,000 28x28 handwritten digits, downloaded",
        _InMemory(
            "mnist",
            "MNIST",
            InputSpec((28, 28), 1, mean=(0.5,), std=(0.5,)),
            {"none": Augmentation(), "basic": _MNIST_RECIPE, "standard": _MNIST_RECIPE},
        ),
    ),
    (
        "70,000 28x28 pictures of clothes, downloaded",
        _InMemory(
            "fashion-mnist",
            "FashionMNIST",
            InputSpec((28, 28), 1, mean=(0.286,), std=(0.353,)),
            {"none": Augmentation(), "basic": _FASHION_RECIPE, "standard": _FASHION_RECIPE},
        ),
    ),
    (
        "60,000 32x32 photos of 10 classes, downloaded",
        _InMemory("cifar10", "CIFAR10", _CIFAR_INPUTS, cifar_recipes((32, 32))),
    ),
    (
        "60,000 32x32 photos of 100 classes, downloaded",
        _InMemory("cifar100", "CIFAR100", _CIFAR_INPUTS, cifar_recipes((32, 32))),
    ),
):
    register_dataset(DatasetSpec(_dataset.name, _summary, _dataset.load))
