"""From image files to sources: what all datasets of files share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from locallearn.data.cache import ImageCache, digest_of_files
from locallearn.data.dataset import LoadRequest
from locallearn.data.images import FileImages, ImageSource, decode_all
from locallearn.data.listening import Work, telling
from locallearn.data.reading import (
    MIN_FILES_FOR_WORKERS,
    ImageHeader,
    read_all,
    read_header,
    resized,
    try_read,
)

R = TypeVar("R")


@dataclass(frozen=True)
class Listing:
    """The image files of one part of a dataset, and their labels."""

    paths: list[Path]
    labels: Tensor
    class_names: tuple[str, ...]


class ImageFiles:
    """The files of a dataset's parts, their headers read.

    Arguments:
        name: of the dataset.
        root: where the files lie.
        parts: training part first.
        request: has the memory limit, the cache and the listener.

    Raises:
        UserError: names the files that are no images; a damaged cache.
    """

    def __init__(
        self, name: str, root: Path, parts: Sequence[Listing], request: LoadRequest
    ) -> None:
        self.parts = parts
        self.paths = [path for part in parts for path in part.paths]
        self._request = request
        self._cache: ImageCache | None = None
        if request.cache is not None:
            digest = digest_of_files(root, self.paths)
            self._cache = ImageCache(request.cache, name, root, digest)

        def scan() -> list[ImageHeader]:
            read = functools.partial(read_all, self.paths, try_read(read_header))
            return _told(request, "reading the sizes of", len(self.paths), read)

        if self._cache is None:
            self.headers = scan()
        else:
            rows = self._cache.rows("headers", scan)
            self.headers = [ImageHeader(*row) for row in rows]

    def decode(self, num_channels: int, resize: int | None, notes: list[str]) -> list[ImageSource]:
        """Each part in memory, or streaming where all of them together are too large for it.

        Arguments:
            num_channels: 1 (grey) or 3 (RGB).
            resize: the shorter side is scaled to this, pixels; None keeps the size.
            notes: is told where they stream.

        Raises:
            UserError: unreadable images, or what :meth:`ImageCache.images` raises.
            OSError: as the file system says.
        """
        labels = torch.cat([part.labels for part in self.parts])
        everything = FileImages(self.paths, labels, num_channels, resize)
        num_bytes = num_channels * sum(_area(header, resize) for header in self.headers)
        limit = self._request.memory_limit_bytes
        nums = [len(part.paths) for part in self.parts]
        ranges = torch.split(torch.arange(len(self.paths)), nums)
        too_large = (
            f"{num_bytes / 2**30:.1f} GiB of decoded images exceed the {limit / 2**30:.1f} GiB "
            f"set aside for them: they"
        )
        if self._cache is not None:
            mapped = self._cache.images(everything, num_bytes, self._request.listener)
            parts = [mapped.subset(each) for each in ranges]
            if num_bytes > limit:
                notes.append(f"{too_large} are read from {self._request.cache}")
                return list(parts)
            return [part.read() for part in parts]
        sources = [everything.subset(each) for each in ranges]
        if num_bytes > limit:
            notes.append(f"{too_large} stream from disk")
            return list(sources)
        return [
            _told(self._request, "decoding", len(source), functools.partial(decode_all, source))
            for source in sources
        ]


def _told(
    request: LoadRequest, verb: str, num: int, do: Callable[[Callable[[int], None] | None], R]
) -> R:
    """What ``do`` returns; the listener is told of it where there are enough files to wait for."""
    if num < MIN_FILES_FOR_WORKERS:
        return do(None)
    with telling(request.listener, Work(verb, f"{num:,} images", "images", num)) as tell:
        return do(tell)


def _area(header: ImageHeader, resize: int | None) -> int:
    """Pixels of an image once it is scaled."""
    if resize is None:
        return header.height * header.width
    width, height = resized(header.width, header.height, resize)
    return width * height
