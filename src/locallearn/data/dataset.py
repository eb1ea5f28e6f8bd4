"""Datasets by name: what a loaded one is, how it is split, and the registry."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from locallearn.data.augment import AUGMENTATIONS, Augmentation
from locallearn.data.images import (
    FileImages,
    ImageSource,
    InputSpec,
    MappedImages,
    MemoryImages,
    decode_all,
)
from locallearn.data.listening import SILENT, DataListener
from locallearn.errors import UserError, unknown_name
from locallearn.registry import Registry

# Seeds what belongs to the data and not to the run: a test part cut from a folder without one,
# and which images --limit-train and --limit-test keep.
DATA_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """A loaded dataset.

    Arguments:
        name: in the registry.
        class_names: K names, in label order.
        inputs: what the network sees of an image.
        augmentation: what training images undergo.
        train, test: images and labels.
        val: held out of the training set, where asked for.
        notes: what the user should know of how it was loaded, a line each.
    """

    name: str
    class_names: tuple[str, ...]
    inputs: InputSpec
    augmentation: Augmentation
    train: ImageSource
    test: ImageSource
    val: ImageSource | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Differs when the images or labels to train and test on differ."""
        parts = [self.train, self.test] + ([self.val] if self.val is not None else [])
        return "-".join(part.fingerprint() for part in parts)


@dataclass(frozen=True)
class LoadRequest:
    """What a dataset's loader is asked for.

    Arguments:
        data_dir: where the files are or go to.
        augment: name of a recipe; the dataset's own default where None.
        image_size: height and width for data whose images have no common size, pixels.
        memory_limit_bytes: largest size of the decoded training images to keep in memory.
        cache: directory of decoded images; None for none.
        view: what a network that is trained already sees; None leaves it to the data.
        listener: is told of downloads and of whatever else takes long.
    """

    data_dir: Path | None
    augment: str | None
    image_size: int | None
    memory_limit_bytes: int
    cache: Path | None = None
    view: InputSpec | None = None
    listener: DataListener = SILENT


@dataclass(frozen=True)
class DatasetSpec:
    """A registered dataset.

    Arguments:
        name: in the registry.
        summary: one line.
        load: yields the whole of it; where it leaves mean and std empty they are measured, and
            limits and splits are applied, by :func:`load_dataset`.
        needs_data_dir: whether the user must say where the files are.
        can_resize: whether ``image_size`` means anything to it.
        can_cache: whether ``cache`` does: it consists of image files.
    """

    name: str
    summary: str
    load: Callable[[LoadRequest], Dataset]
    needs_data_dir: bool = False
    can_resize: bool = False
    can_cache: bool = False


_DATASETS: Registry[DatasetSpec] = Registry("dataset")


def register_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Make a dataset known by its name."""
    return _DATASETS.add(spec.name, spec)


def list_datasets(pattern: str = "*") -> list[str]:
    """Names of the registered datasets that match the glob ``pattern``, sorted."""
    return _DATASETS.names(pattern)


def dataset_spec(name: str) -> DatasetSpec:
    """What is registered under a name. Raises UserError with the valid names."""
    return _DATASETS.get(name)


def default_data_dir() -> Path:
    """Where downloads go: $LOCALLEARN_DATA, else ~/.cache/locallearn."""
    given = os.environ.get("LOCALLEARN_DATA")
    return Path(given) if given else Path.home() / ".cache" / "locallearn"


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    augment: str | None = None,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    val_split: float = 0.0,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    cache: str | Path | None = None,
    view: InputSpec | None = None,
    holds_out_every_class: bool = False,
    listener: DataListener = SILENT,
) -> Dataset:
    """A dataset by name, ready to train on.

    Arguments:
        name: one of :func:`list_datasets`.
        data_dir: where the files are, or are downloaded to.
        augment: "none", "basic" or "standard"; the dataset's default where None.
        image_size: for folder and vww, height and width to train at, pixels.
        limit_train, limit_test: keep so many images at most, stratified by class.
        val_split: share of the training set to hold out, stratified, chosen by ``seed``.
        seed: of the validation split.
        memory_limit_bytes: decoded training images above this size stream from disk; by default
            a quarter of the machine's free memory.
        cache: directory where the decoded images of a dataset of files are kept, or are put.
        view: what a network that is trained already sees of an image: size, channels and
            normalisation. Images of files are scaled to it; others must be of that shape.
        holds_out_every_class: the validation split takes at least one image of each class.
        listener: is told of downloads and of whatever else takes long.

    Raises:
        UserError: unknown names, missing or unusable data, or numbers out of range.
    """
    spec = dataset_spec(name)
    if augment is not None and augment not in AUGMENTATIONS:
        raise unknown_name("augmentation", augment, AUGMENTATIONS)
    if spec.needs_data_dir and data_dir is None:
        raise UserError(f"dataset {name!r} needs --data-dir, the directory of class folders.")
    if image_size is not None and not spec.can_resize:
        raise UserError(f"dataset {name!r} has a fixed image size; leave out --image-size.")
    if cache is not None and not spec.can_cache:
        files = ", ".join(each for each in list_datasets() if dataset_spec(each).can_cache)
        raise UserError(
            f"dataset {name!r} is not made of image files; leave out --cache, which is for {files}."
        )
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise UserError(f"--cache {cache} is a file; give a directory.")
    for argument, number in (
        ("limit-train", limit_train),
        ("limit-test", limit_test),
        ("image-size", image_size),
    ):
        if number is not None and number < 1:
            raise UserError(f"--{argument} must be at least 1, got {number}.")
    if not 0.0 <= val_split < 1.0:
        raise UserError(f"--val-split must be in [0, 1), got {val_split}.")

    if view is not None and spec.can_resize and image_size is None:
        image_size = view.image_size[0]
    request = LoadRequest(
        data_dir=Path(data_dir) if data_dir is not None else None,
        augment=augment,
        image_size=image_size,
        memory_limit_bytes=(
            free_memory_bytes() // 4 if memory_limit_bytes is None else memory_limit_bytes
        ),
        cache=Path(cache) if cache is not None else None,
        view=view,
        listener=listener,
    )
    dataset = spec.load(request)
    if view is not None:
        _check_view(dataset, view)
        inputs = replace(dataset.inputs, mean=view.mean, std=view.std)
        dataset = replace(dataset, inputs=inputs)
    if dataset.num_classes < 2:
        raise UserError(
            f"dataset {name!r} has one class only ({dataset.class_names[0]!r}); at least two are "
            f"needed to learn to tell them apart."
        )
    train, test = dataset.train, dataset.test
    if limit_train is not None:
        train = train.subset(stratified_order(train.labels, DATA_SEED)[:limit_train])
    if limit_test is not None:
        test = test.subset(stratified_order(test.labels, DATA_SEED)[:limit_test])
    val = None
    if val_split:
        least = 1 if holds_out_every_class else 0
        kept, held = stratified_split(train.labels, val_split, seed, at_least=least)
        if holds_out_every_class:
            _check_kept(train.labels, kept, dataset.class_names, val_split)
        if not len(held) or not len(kept):
            raise UserError(
                f"--val-split {val_split} of {len(train)} training images leaves one of the parts "
                f"empty; choose another share."
            )
        train, val = train.subset(kept), train.subset(held)
    dataset = replace(dataset, train=train, test=test, val=val)
    if not dataset.inputs.mean:
        mean, std = channel_statistics(train)
        dataset = replace(dataset, inputs=replace(dataset.inputs, mean=mean, std=std))
    return dataset


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """All indices in an order of which every beginning has the classes in their proportions."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        # The i-th of n members comes i + 1/2 n-ths of the way; ties are broken by the shuffle.
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[torch.argsort(rank[shuffled], stable=True)]


def _check_view(dataset: Dataset, view: InputSpec) -> None:
    """Raises UserError where images are not of the shape that the network sees."""
    ours, theirs = ((each.num_channels, *each.image_size) for each in (dataset.inputs, view))
    if ours != theirs:
        raise UserError(
            f"images of dataset {dataset.name!r} are {_by(ours)}, and the network was trained on "
            f"{_by(theirs)}. Give images as files, --dataset folder: those are scaled."
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_kept(labels: Tensor, kept: Tensor, names: tuple[str, ...], share: float) -> None:
    """Raises UserError where a class has lost all of its images to the validation split."""
    left = set(labels[kept].tolist())
    lost = [names[label] for label in torch.unique(labels).tolist() if label not in left]
    if lost and left:
        raise UserError(
            f"--val-split {share:g} leaves no training image of class {lost[0]!r}, which has "
            f"{int((labels == names.index(lost[0])).sum())} in all. Add images, or give a smaller "
            f"share; 0 holds none out."
        )


def stratified_split(
    labels: Tensor, share: float, seed: int, *, at_least: int = 0
) -> tuple[Tensor, Tensor]:
    """(kept, held out): of each class, round(share * n) images are held out, and not fewer than
    ``at_least``; both sorted."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = torch.nonzero(labels == label)[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[
            : max(at_least, round(share * len(members)))
        ]
        held[members[chosen]] = True
    return torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0]


_STATISTICS_SAMPLE = 10_000


def channel_statistics(source: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, of values in [0, 1].

    Of images that do not fit in memory, a stratified sample of 10,000 is measured.
    """
    if isinstance(source, FileImages):
        sample = stratified_order(source.labels, DATA_SEED)[:_STATISTICS_SAMPLE]
        source = decode_all(source.subset(sample))
    elif isinstance(source, MappedImages):
        sample = stratified_order(source.labels, DATA_SEED)[:_STATISTICS_SAMPLE]
        source = source.subset(sample).read()
    assert isinstance(source, MemoryImages)
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in source.pixels.unbind(1):
        share = torch.bincount(channel, minlength=256).double() / len(channel)
        mean = (share * values).sum()
        std = (share * (values - mean).square()).sum().sqrt().item()
        means.append(mean.item())
        stds.append(std if std > 0 else 1.0)
    return tuple(means), tuple(stds)


def free_memory_bytes() -> int:
    """The machine's available memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30
