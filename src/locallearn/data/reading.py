"""Image files to uint8 arrays, one at a time or all of a data set by worker processes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from locallearn.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"}
)
_16_BIT_TO_8 = 257
_ORIENTATION_TAG = 0x0112
_FIRST_TURNED = 5

# Files a reader process hands over at a time, and from how many on processes are worth starting.
_CHUNK = 256
MIN_FILES_FOR_WORKERS = 2000
_MAX_WORKERS = 8
_NAMED_IN_ERROR = 5

R = TypeVar("R")


class ImageHeader(NamedTuple):
    """Height and width as shown (EXIF orientation applied), pixels; whether it has one channel."""

    height: int
    width: int
    is_gray: bool


def read_header(path: Path) -> ImageHeader:
    """What a file says of itself, without decoding it. Raises as :func:`read_image`."""
    with _opened(path) as image:
        width, height = image.size
        if _orientation(image) >= _FIRST_TURNED:
            width, height = height, width
        is_gray = image.mode in ("1", "L") or image.mode.startswith("I")
        return ImageHeader(height, width, is_gray)


def read_image(path: Path, num_channels: int, resize: int | None = None) -> np.ndarray:
    """A file decoded, turned as its EXIF orientation says, and scaled.

    Arguments:
        path: of any format that Pillow reads.
        num_channels: 1 (grey) or 3 (RGB).
        resize: the shorter side is scaled to this, pixels, bilinear with antialiasing.

    Returns:
        (H, W, C), uint8.

    Raises:
        Exception: of many kinds, for unreadable, truncated or foreign content.
    """
    mode = "L" if num_channels == 1 else "RGB"
    with _opened(path) as image:
        if resize is not None:
            image.draft(mode, (resize, resize))  # lets JPEG decode at a smaller scale
        upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
        picture = _to_8_bit(upright).convert(mode)
        if resize is not None:
            width, height = resized(picture.width, picture.height, resize)
            if (width, height) != picture.size:
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(picture).reshape(picture.height, picture.width, num_channels)


def resized(width: int, height: int, resize: int) -> tuple[int, int]:
    """(width, height) with the shorter side scaled to ``resize``, the aspect ratio kept."""
    if width <= height:
        return resize, max(resize, int(resize * height / width))
    return max(resize, int(resize * width / height)), resize


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, for as long as it is read; Pillow's warnings do not reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A picture so large that Pillow suspects an attack is refused, not only warned of.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip at 255, scaled to 8; other depths are refused."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray((values // _16_BIT_TO_8).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """EXIF's: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 lying on a side."""
    # Most files have none, and asking takes as long as decoding a 32x32 image.
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) else 1


def try_read(read: Callable[..., Any], *args: Any) -> Callable[[Path], Any]:
    """A reader that returns None for a file that can't be read; picklable if ``read`` is."""
    return functools.partial(_try_read, read, args)


def _try_read(read: Callable[..., Any], args: tuple[Any, ...], path: Path) -> Any:
    try:
        return read(path, *args)
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise half a dozen kinds on broken files
        return None


def num_workers_for(num_files: int) -> int:
    """How many reader processes pay off for this many files."""
    return 0 if num_files < MIN_FILES_FOR_WORKERS else min(_MAX_WORKERS, os.cpu_count() or 1)


def worker_settings() -> dict[str, Any]:
    """Arguments that every DataLoader here takes.

    A generator of its own, since a loader without one draws from torch's, which belongs to the
    model (dropout); and workers that leave SIGINT and SIGTERM to the process they work for.
    """
    return {"generator": torch.Generator(), "worker_init_fn": _ignore_signals}


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_all(
    paths: Sequence[Path], read: Callable[[Path], Any], tell: Callable[[int], None] | None = None
) -> list[Any]:
    """``read`` of every file, in order, by worker processes where that pays.

    Arguments:
        paths: the files.
        read: returns None for a file that can't be read.
        tell: called on the way with the number of files that are read.

    Raises:
        UserError: names the files for which ``read`` returned None.
    """
    results: list[Any] = []
    for chunk in read_chunks(paths, read):
        results += chunk
        if tell is not None:
            tell(len(results))
    check_readable(paths, [result is None for result in results])
    return results


def read_chunks(
    paths: Sequence[Path], read: Callable[[Path], Any], most: int = sys.maxsize
) -> Iterator[list[Any]]:
    """``read`` of every file, in order, ``most`` files at a time or fewer, by worker processes."""
    loader: DataLoader[list[Any]] = DataLoader(
        _Chunks(paths, read, min(most, _CHUNK)),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers_for(len(paths)),
        **worker_settings(),
    )
    yield from loader


def check_readable(paths: Sequence[Path], is_broken: Sequence[bool]) -> None:
    """Raises UserError that names the broken files, where there are any."""
    broken = [path for path, bad in zip(paths, is_broken, strict=True) if bad]
    if broken:
        raise UserError(f"unreadable images: {some(broken)}. Remove or replace them.")


class _Chunks(TorchDataset[list[Any]]):
    """Chunk number -> what ``read`` makes of that chunk's files."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Any], size: int) -> None:
        self.paths = paths
        self.read = read
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.paths) // self.size)

    def __getitem__(self, chunk: int) -> list[Any]:
        first = chunk * self.size
        return [self.read(path) for path in self.paths[first : first + self.size]]


def _unchanged(chunk: R) -> R:
    return chunk


def some(things: Iterable[object]) -> str:
    """The first few of a list, and how many more there are."""
    names = [str(thing) for thing in things]
    more = len(names) - _NAMED_IN_ERROR
    shown = ", ".join(names[:_NAMED_IN_ERROR])
    return f"{shown} and {more} more" if more > 0 else shown
