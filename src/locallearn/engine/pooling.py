"""Small batches put together, for BatchNorm's statistics to be estimated on them.

Shapes: N batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from locallearn.engine.blocks import Inputs, num_inputs

# Small batches are put together to such of at least so many images.
_POOLED_IMAGES = 32


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
        if num_waiting >= max(least, _POOLED_IMAGES):
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
