"""Decoded images on disk, so that later runs neither decode nor open the files.

    DIR/NAME-KEY/            one dataset at one size; KEY tells both and every file's state
        cache.json           what it is
        index.npy            (M, 3), int64: height, width, label of each image
        pixels.u8            the images' rows one after the other, uint8, (P, C)
    DIR/NAME-KEY.json        rows of what else is slow to find out: each file's size and channels as
                             its header tells them, the labels that annotations amount to

All appear under their names when they are whole. Shapes: M images, P pixels of all of them,
C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from locallearn.data.disk import check_space, lock, naming, only_one
from locallearn.data.images import FileImages, MappedImages
from locallearn.data.listening import DataListener, Work, readable_size, telling
from locallearn.data.reading import check_readable, read_chunks, read_image, try_read
from locallearn.errors import UserError

_FORMAT, _FORMAT_VERSION = "locallearn-cache", 1
_KEY_DIGITS = 16
_CHUNK_BYTES = 1 << 25  # decoded by a reader process at a time


def digest_of_files(root: Path, paths: Sequence[Path]) -> str:
    """Differs when a file's path below ``root``, size or time of change differs."""
    digest = hashlib.sha256()
    beginning = f"{root}{os.sep}"
    for path in paths:
        text = str(path)
        name = text.removeprefix(beginning)
        try:
            state = os.stat(text)
        except OSError:  # it is named when it is read
            digest.update(os.fsencode(f"{name}\0gone\n"))
        else:
            digest.update(os.fsencode(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n"))
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageCache:
    """The cache of one dataset's files.

    Arguments:
        directory: DIR, which need not exist.
        name: of the dataset.
        root: where its files lie.
        digest: of their state, see :func:`digest_of_files`.
    """

    directory: Path
    name: str
    root: Path
    digest: str

    def _path(self, what: str) -> Path:
        key = hashlib.sha256(f"{self.digest} {what}".encode()).hexdigest()[:_KEY_DIGITS]
        return self.directory / f"{self.name}-{key}"

    def rows(self, what: str, make: Callable[[], list[Any]]) -> list[Any]:
        """The rows of a table that follows from the files: plain values, as JSON has them.

        Arguments:
            what: tells it from others.
            make: its rows, where they are not here.

        Raises:
            UserError: a damaged file here, or what ``make`` raises.
            OSError: as the file system says.
        """
        path = self._path(what)
        path = path.with_name(f"{path.name}.json")
        if path.exists():
            try:
                document = json.loads(path.read_text())
                rows = list(document["rows"])
                whole = document["num_rows"] == len(rows)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise UserError(
                    f"the cache {path} is damaged (it can't be read, or rows of it are missing). "
                    f"Delete that file; it is made anew."
                )
            return rows
        rows = make()
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            temporary.write_text(json.dumps({"num_rows": len(rows), "rows": rows}))
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        return rows

    def images(self, files: FileImages, num_bytes: int, listener: DataListener) -> MappedImages:
        """The decoded images of ``files``, which are all of the dataset's.

        Arguments:
            files: decoded where they are not here.
            num_bytes: about what that will take, for the check of the disk.
            listener: is told of the decoding.

        Raises:
            UserError: unreadable images, too little disk space, or a damaged cache.
            OSError: as the file system says.
        """
        labels = hashlib.sha256(files.labels.numpy().tobytes()).hexdigest()
        path = self._path(f"{labels} {files.resize} {files.num_channels}")
        if not path.exists():
            self._remove_abandoned()
            check_space(self.directory, num_bytes, f"the cache of {self.name}")
            what = f"{len(files):,} images ({readable_size(num_bytes)})"
            work = Work("decoding", what, "images", len(files), target=self.directory)
            with telling(listener, work) as tell, naming(path):
                self._make(path, files, num_bytes, tell)
        try:
            return _open(path, files)
        except ValueError as error:
            raise UserError(
                f"the cache {path} is damaged ({error}). Delete that directory; it is made anew."
            ) from error

    def _make(
        self, path: Path, files: FileImages, num_bytes: int, tell: Callable[[int], None]
    ) -> None:
        temporary = _temporary(path)
        temporary.mkdir(parents=True)
        try:
            # The lock tells others that it is not abandoned.
            with open(temporary / "pixels.u8", "wb") as pixels:
                only_one(pixels, f"{temporary} is being removed")
                sizes = _decode(files, pixels, num_bytes, tell)
                index = np.column_stack([np.array(sizes, np.int64), files.labels.numpy()])
                np.save(temporary / "index.npy", index)
                about = {
                    "format": _FORMAT,
                    "format_version": _FORMAT_VERSION,
                    "dataset": self.name,
                    "made_from": str(self.root.absolute()),
                    "num_images": len(files),
                    "num_channels": files.num_channels,
                    "resize": files.resize,
                    "num_bytes": pixels.tell(),
                }
                (temporary / "cache.json").write_text(json.dumps(about, indent=2) + "\n")
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.exists():  # else another process was faster: its cache is the same
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        """Half-made caches of the dataset, of processes that were killed."""
        for pixels in self.directory.glob(f".{self.name}-*.tmp/pixels.u8"):
            with contextlib.suppress(OSError), open(pixels, "rb") as file:
                # One that has its last file is about to get its name.
                if lock(file) and not (pixels.parent / "cache.json").exists():
                    shutil.rmtree(pixels.parent, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name beside it that no other process has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _decode(
    files: FileImages, pixels: IO[bytes], num_bytes: int, tell: Callable[[int], None]
) -> list[tuple[int, int]]:
    """Write all images, one after the other; their heights and widths.

    Raises:
        UserError: names the unreadable ones.
        OSError: as the file system says.
    """
    sizes: list[tuple[int, int]] = []
    is_broken: list[bool] = []
    decode = try_read(read_image, files.num_channels, files.resize)
    chunk = max(1, _CHUNK_BYTES * len(files) // max(1, num_bytes))
    for images in read_chunks(files.paths, decode, chunk):
        for image in images:
            is_broken.append(image is None)
            if image is not None:
                sizes.append(image.shape[:2])
                pixels.write(image.data)
        tell(len(is_broken))
    check_readable(files.paths, is_broken)
    pixels.flush()
    os.fsync(pixels.fileno())
    return sizes


def _open(path: Path, files: FileImages) -> MappedImages:
    """Raises ValueError where it is not whole."""
    for name in ("cache.json", "index.npy", "pixels.u8"):
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
    try:
        about = json.loads((path / "cache.json").read_text())
        version = about["format"], about["format_version"]
        size = about["num_channels"], about["resize"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("cache.json can't be read") from error
    if version != (_FORMAT, _FORMAT_VERSION):
        raise ValueError("cache.json is of another version")
    if size != (files.num_channels, files.resize):
        raise ValueError("cache.json tells another size")
    index = torch.from_numpy(_load_array(path / "index.npy", len(files)))
    if not torch.equal(index[:, 2], files.labels):
        raise ValueError("index.npy holds other labels")
    heights, widths = index[:, 0].contiguous(), index[:, 1].contiguous()
    areas = heights * widths
    found, expected = (path / "pixels.u8").stat().st_size, int(areas.sum()) * files.num_channels
    if found != expected:
        raise ValueError(f"pixels.u8 has {found:,} bytes, expected {expected:,}")
    pixels = np.memmap(path / "pixels.u8", np.uint8, "r").view(np.ndarray)
    return MappedImages(
        files,
        path / "pixels.u8",
        pixels.reshape(-1, files.num_channels),
        torch.cumsum(areas, 0) - areas,
        heights,
        widths,
        files.labels,
    )


def _load_array(path: Path, num: int) -> np.ndarray:
    """A (num, 3) array of whole numbers. Raises ValueError where the file holds none."""
    try:
        array = np.load(path, allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} can't be read") from error
    if not isinstance(array, np.ndarray) or array.shape != (num, 3) or array.dtype.kind != "i":
        raise ValueError(f"{path.name} holds something else")
    return array
