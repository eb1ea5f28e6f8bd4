"""The last training batches, on which BatchNorm's statistics are estimated anew.

Shapes: N batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from locallearn.engine.blocks import Inputs, num_inputs

# Of small batches so many images are held, ...
_NUM_IMAGES = 256
# ... if they take no more memory than this.
_MAX_BYTES = 64 * 2**20
# Small batches are put together to such of at least so many images.
POOLED_IMAGES = 32


class _Held(NamedTuple):
    images: Inputs
    num_images: int
    num_bytes: int


class RecentBatches:
    """The last batches of a training.

    Arguments:
        num_batches: so many are held; 0 for none.
        least: of batches with fewer images more are held, to some hundred images. These are
            copies, so that a camera may go on writing into the same frame.
    """

    def __init__(self, num_batches: int, least: int) -> None:
        self.num_batches = num_batches
        self.least = least
        self._held: deque[_Held] = deque()
        self._num_images = self._num_bytes = 0

    @property
    def num_images(self) -> int:
        """Of all that are held."""
        return self._num_images

    def add(self, images: Inputs) -> None:
        """Hold on to a batch, and let go of old ones."""
        if self.num_batches == 0:
            return
        num_images = num_inputs(images)
        is_small = num_images < self.least
        keep = _copied if is_small else Tensor.detach
        images = tree_map_only(Tensor, keep, images)
        num_bytes = sum(t.nbytes for t in tree_leaves(images) if isinstance(t, Tensor))
        self._held.append(_Held(images, num_images, num_bytes))
        self._num_images += num_images
        self._num_bytes += num_bytes
        while len(self._held) > self.num_batches and self._is_enough_without(self._held[0]):
            oldest = self._held.popleft()
            self._num_images -= oldest.num_images
            self._num_bytes -= oldest.num_bytes

    def _is_enough_without(self, oldest: _Held) -> bool:
        is_large = oldest.num_images >= self.least
        is_enough = self._num_images - oldest.num_images >= _NUM_IMAGES
        return is_large or is_enough or self._num_bytes > _MAX_BYTES

    def __iter__(self) -> Iterator[Inputs]:
        return (held.images for held in self._held)

    def __len__(self) -> int:
        return len(self._held)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def pooled(batches: Iterable[Inputs], least: int) -> Iterator[Inputs]:
    """The batches; those of fewer than ``least`` images put together with their neighbours.

    Only such as are of one shape go together. What is left in the end and is still fewer is left
    out where something else has come.
    """
    waiting: list[Inputs] = []
    num_waiting, has_come = 0, False
    for batch in batches:
        num_images = num_inputs(batch)
        if waiting and (num_images >= least or _shapes(batch) != _shapes(waiting[0])):
            if num_waiting >= least:
                has_come = True
                yield _together(waiting)
            waiting, num_waiting = [], 0
        if num_images >= least:
            has_come = True
            yield batch
            continue
        waiting.append(batch)
        num_waiting += num_images
        if num_waiting >= max(least, POOLED_IMAGES):
            has_come = True
            yield _together(waiting)
            waiting, num_waiting = [], 0
    if waiting and (num_waiting >= least or not has_come):
        yield _together(waiting)


def _shapes(images: Inputs) -> list[torch.Size | None]:
    leaves = tree_leaves(images)
    return [leaf.shape[1:] if isinstance(leaf, Tensor) else None for leaf in leaves]


def _together(batches: list[Inputs]) -> Inputs:
    if len(batches) == 1:
        return batches[0]
    flat = [tree_flatten(batch) for batch in batches]
    leaves = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])
