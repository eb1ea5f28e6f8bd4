"""Updates from gradients that are first summed over replicas, while the next blocks run.

A replica trains the same blocks on another part of each batch. What a block's gradients are summed
over replicas by is attached to the learner's :class:`Updates`; the engine knows no processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from locallearn.kernels.storage_order import in_storage_order, storage_order


class Pending(Protocol):
    """A sum that is being made."""

    def is_done(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        ...

    def wait(self) -> None:
        """Until the sum is there; on CUDA for what the current stream is given afterwards."""
        ...


class GradientReduction(Protocol):
    """What brings replicas together. All of them ask for the same things in the same order."""

    def begin(self, bucket: Tensor) -> Pending:
        """Begin to replace what is in ``bucket``, 1-d, by its sum over the replicas."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Every replica's, stacked in their order: (D, ...). Waits."""
        ...


class Updates:
    """Steps the optimizers of a learner: at once, or after a reduction where one is attached.

    Then the gradients of an optimizer's parameters go into one tensor, the bucket, whose reduction
    begins at once. Reductions that are seen to be complete at the next update are applied there,
    the others at the end of the step. Losses are means over a replica's own images, so replicas
    count by how many they have: the result is the gradient of the mean over all of them.

    Attributes:
        reduction: over replicas; None updates at once.
        num_images: of this replica in this step. With none it has run on something else, and adds
            nothing to the sums.
    """

    def __init__(self) -> None:
        self.reduction: GradientReduction | None = None
        self.num_images = 0
        self._begun: list[_Begun] = []

    def step(self, optimizer: Optimizer) -> None:
        """From the gradients that are there, which are then freed."""
        if self.reduction is None:
            _step(optimizer)
            return
        self._begun.append(_begin(optimizer, self.reduction, self.num_images))
        waiting = []
        for begun in self._begun:
            if begun.pending.is_done():
                begun.apply()
            else:
                waiting.append(begun)
        self._begun = waiting

    def settle(self, optimizer: Optimizer | None) -> None:
        """Apply what is begun of one optimizer: its parameters are needed now."""
        of_it = [begun for begun in self._begun if begun.optimizer is optimizer]
        self._begun = [begun for begun in self._begun if begun.optimizer is not optimizer]
        for begun in of_it:
            begun.apply()

    def finish(self) -> None:
        """Apply all that is begun."""
        begun, self._begun = self._begun, []
        for each in begun:
            each.apply()

    def abandon(self) -> None:
        """Forget what is begun, of a step that failed."""
        self._begun = []


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class _Begun:
    """An update that waits for its gradients.

    Arguments:
        optimizer: to be stepped.
        parameters: of the optimizer.
        has_grad: of each, whether it has a gradient of this replica's images.
        bucket: the gradients, for each parameter a mark (how many images' gradients reach it), and
            how many images there are; summed once it is no longer pending.
        pending: the reduction.
    """

    optimizer: Optimizer
    parameters: list[Tensor]
    has_grad: list[bool]
    bucket: Tensor
    pending: Pending

    @torch.no_grad()
    def apply(self) -> None:
        self.pending.wait()
        total = sum(p.numel() for p in self.parameters)
        gradients, marks, num_images = self.bucket[:total], self.bucket[total:-1], self.bucket[-1]
        reached = self.has_grad
        if not all(reached):  # here; the marks of the others are looked at only then
            reached = [mark > 0 for mark in marks.tolist()]
        if not any(reached):
            return
        gradients /= num_images.clamp(min=1)
        parts = torch.split(gradients, [p.numel() for p in self.parameters])
        for parameter, part, is_reached in zip(self.parameters, parts, reached, strict=True):
            if is_reached:
                parameter.grad = _unflattened(part, parameter).to(parameter.dtype)
        _step(self.optimizer)


@torch.no_grad()
def _begin(optimizer: Optimizer, reduction: GradientReduction, num_images: int) -> _Begun:
    """The gradients are taken from the parameters."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    # Not below float32, in which images are counted exactly.
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    device = parameters[0].device
    has_grad = [p.grad is not None for p in parameters]
    if all(has_grad):
        marks = torch.ones(len(parameters) + 1, dtype=dtype, device=device)
    else:
        marks = torch.tensor([*has_grad, True], dtype=dtype, device=device)
    parts = [
        in_storage_order(torch.zeros_like(p) if p.grad is None else p.grad, p).to(dtype)
        for p in parameters
    ]
    bucket = torch.cat([*parts, marks])
    if num_images == 0:
        bucket.zero_()  # and not times 0: what it ran on may have given NaN
        has_grad = [False] * len(parameters)
    else:
        bucket *= num_images
    for parameter in parameters:
        parameter.grad = None
    return _Begun(optimizer, parameters, has_grad, bucket, reduction.begin(bucket))


def _unflattened(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of `in_storage_order`: a view that lies as ``like`` does."""
    order = storage_order(like)
    assert part.numel() == math.prod(like.shape)
    back = sorted(range(like.ndim), key=order.__getitem__)
    return part.view([like.shape[axis] for axis in order]).permute(back)
