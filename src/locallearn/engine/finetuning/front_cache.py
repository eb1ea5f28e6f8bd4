"""What a frozen front makes of a dataset's images, kept on disk.

    DIR/KEY.npy     (V, M, ...): views, images, what the front makes of one

KEY is a digest of all that it follows from: the front's weights, the images, how they are seen.
So a second run finds what the first has made, and another never does. Files are written to a
temporary name and renamed: one that is there is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locallearn.data import (
    DataListener,
    ImageLoader,
    InputSpec,
    Work,
)
from locallearn.data.disk import check_space, naming
from locallearn.data.features import FEATURE_DTYPES, STORED_DTYPES
from locallearn.data.listening import telling
from locallearn.engine.config import TrainConfig
from locallearn.engine.finetuning.front import FrozenFront
from locallearn.engine.finetuning.source import add_tensor
from locallearn.errors import UserError

_FORMAT = "locallearn-front-1"


@dataclass(frozen=True)
class Part:
    """Of a dataset.

    Arguments:
        name: train, val or test.
        loader: its images in its own order; of several views, one an epoch.
        num_views: V; more than one are augmented by the run's seed.
        augmentation: what the views undergo, in words.
        fingerprint: of the images.
    """

    name: str
    loader: ImageLoader
    num_views: int
    augmentation: str
    fingerprint: str


def cached_features(
    front: FrozenFront,
    parts: Sequence[Part],
    directory: Path,
    settings: TrainConfig,
    inputs: InputSpec,
    listener: DataListener,
) -> dict[str, np.ndarray]:
    """What the front makes of each part, (V, M, ...), mapped; made where it is not there yet.

    Arguments:
        front: of the learner, with its weights.
        parts: of the dataset.
        directory: where it is kept; made where there is none.
        settings: of the run, resolved.
        inputs: what the network sees.
        listener: is told of what takes long.

    Raises:
        UserError: too little room, no directory, or a file that can't be read.
        OSError: as the file system says.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--cache {directory} is a file; give a directory.")
    base = _digest_of_front(front, settings, inputs)
    paths = {part.name: directory / f"{_key(base, part, settings)}.npy" for part in parts}
    dtype = STORED_DTYPES[settings.cache_dtype]
    shapes = {
        part.name: (part.num_views, part.loader.num_images, *front.feature_shape) for part in parts
    }
    missing = [part for part in parts if not paths[part.name].exists()]
    num_bytes = sum(dtype.itemsize * int(np.prod(shapes[part.name])) for part in missing)
    check_space(directory, num_bytes, "--cache")
    directory.mkdir(parents=True, exist_ok=True)
    for part in missing:
        _make(front, part, paths[part.name], shapes[part.name], settings.cache_dtype, listener)
    return {name: _open(path, shapes[name], dtype) for name, path in paths.items()}


def _digest_of_front(front: FrozenFront, settings: TrainConfig, inputs: InputSpec) -> str:
    facts = {
        "format": _FORMAT,
        "model": settings.model,
        "model_digest": settings.model_digest,
        "width": settings.width,
        "activation": settings.activation,
        "norm": settings.norm,
        "cut": front.cut_name,
        "precision": settings.precision,
        "inputs": asdict(inputs),
        "kept_as": settings.cache_dtype,
    }
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    state = front.learner.model.state_dict()
    for name in front.state_names:
        add_tensor(total, name, state[name])
    return total.hexdigest()


def _key(base: str, part: Part, settings: TrainConfig) -> str:
    facts = [base, part.fingerprint, part.num_views]
    if part.num_views > 1:
        facts += [part.augmentation, settings.seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@torch.no_grad()
def _make(
    front: FrozenFront,
    part: Part,
    path: Path,
    shape: tuple[int, ...],
    kept_as: str,
    listener: DataListener,
) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    num_views, num_images = shape[:2]
    views = f" in {num_views} views" if num_views > 1 else ""
    work = Work(
        "running the frozen blocks over",
        f"{num_images:,} {part.name} images{views}",
        "images",
        num_views * num_images,
    )
    try:
        with naming(path), telling(listener, work) as tell:
            file = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=STORED_DTYPES[kept_as], shape=shape
            )
            for view in range(num_views):
                first = 0
                for images, _ in part.loader.epoch(view):
                    made = _stored(front.made(images), kept_as)
                    file[view, first : first + len(made)] = made
                    first += len(made)
                    tell(view * num_images + first)
                assert first == num_images
            file.flush()
            del file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _stored(made: Tensor, kept_as: str) -> np.ndarray:
    """As it is kept: in NumPy's order, bfloat16 as its bits."""
    values = made.to("cpu", FEATURE_DTYPES[kept_as]).contiguous()
    bits = values.view(torch.int16) if kept_as == "bf16" else values
    array: np.ndarray = bits.numpy()
    return array


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    try:
        features: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} can't be read ({error}). Delete it: it is made anew.") from error
    if features.shape != shape or features.dtype != dtype:
        raise UserError(f"{path} holds something else than it says. Delete it: it is made anew.")
    return features
