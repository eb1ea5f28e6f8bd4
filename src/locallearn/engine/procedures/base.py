"""What the procedures share: what they yield, and the layer that lies in no block.

Shapes: N batch, K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.blocks import Inputs
from locallearn.engine.reduction import Updates
from locallearn.engine.units import UnitSignal
from locallearn.errors import UserError

_MOST_NAMED = 8  # parameters in a warning


class Outcome(NamedTuple):
    """What a step yields: logits (N, K), detached, not below float32; their cross-entropy; and
    what the blocks' heads said, in the order of the forward."""

    logits: Tensor
    loss: Tensor
    signals: dict[str, UnitSignal]


class Procedure(Protocol):
    """A training step: the forward, and every update. Runs in training mode, under autocast.

    Attributes:
        can_be_graphed: whether it launches the same each time, with no number read on the host.
    """

    can_be_graphed: bool

    def __call__(self, images: Inputs, labels: Tensor) -> Outcome: ...

    def num_at_a_time(self, num_images: int) -> int:
        """How many of a batch's images go through the model together."""
        ...


class OutputLayer:
    """What lies in no block: it learns from the cross-entropy of the logits.

    Arguments:
        parameters: name -> what lies in no block and is to be trained.
        optimizer: of these; None where there are none.
        num_classes: K.
        label_smoothing: of the cross-entropy.
        is_behind_blocks: whether blocks cut the way back, so that a parameter before the last of
            them may not be reached; the user is told once.
        is_shared: whether blocks read some of these parameters too, and add to their gradients.
        updates: of the learner that it is of.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer | None,
        *,
        num_classes: int,
        label_smoothing: float,
        is_behind_blocks: bool,
        is_shared: bool = False,
        updates: Updates,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self._warns = is_behind_blocks
        self.is_shared = is_shared
        self.updates = updates

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits that are not below float32.

        Raises:
            UserError: another number of logits than K.
        """
        if logits.shape[1] != self.num_classes:
            raise UserError(
                f"the model yields logits of shape {tuple(logits.shape)}, but num_classes is "
                f"{self.num_classes}. Give the number that the model was made for; of a tuple, "
                f"the logits are taken to come first."
            )
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def error(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and dL/dlogits (N, K); nothing of the network is reached."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = self.loss(leaf, labels)
            (error,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), error

    def learn(self, outputs: Tensor, gradient: Tensor | None = None) -> None:
        """Backward from a loss, or from logits and their gradient, and update."""
        self.backward(outputs, gradient)
        self.update()

    def backward(self, outputs: Tensor, gradient: Tensor | None = None) -> None:
        """Add to the gradients, from a loss, or from logits and their gradient."""
        if self.optimizer is None or not outputs.requires_grad:
            return
        # What lies in no block may be read by blocks too, which walk its graph themselves.
        outputs.backward(gradient, retain_graph=self.is_shared)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """From the gradients that are there."""
        if self.optimizer is None:
            return
        if self._warns:
            self._warn_of_the_unreached()
            self._warns = False
        if self.updates.reduction is None and all(p.grad is None for p in self.parameters.values()):
            return
        self.updates.step(self.optimizer)

    def _warn_of_the_unreached(self) -> None:
        unreached = [name for name, p in self.parameters.items() if p.grad is None]
        if unreached:
            named = ", ".join(unreached[:_MOST_NAMED])
            if len(unreached) > _MOST_NAMED:
                named += f" and {len(unreached) - _MOST_NAMED} more"
            warnings.warn(
                f"no block holds {named}, and the output's gradient does not reach "
                f"across the blocks behind: they will not train. Name a block that holds them.",
                stacklevel=3,
            )


def logits_of(output: Any) -> Tensor:
    """The logits of what a model yields, (N, K): the tensor, its field or key "logits" (as of
    networks with auxiliary classifiers), or the first of a tuple.

    Raises:
        UserError: none of these.
    """
    logits = output
    if isinstance(output, dict):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else None
        logits = getattr(output, "logits", first)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = (
            f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        )
        raise UserError(
            f"the model yields {what}; logits of shape (N, K) are expected, or something with a "
            f"field `logits`, or a tuple that begins with them."
        )
    return logits


def not_below_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextlib.contextmanager
def without_running_statistics(model: nn.Module) -> Iterator[None]:
    """Within: BatchNorm normalises by the batch, and its running statistics stay as they are.

    They are updated at rate zero rather than put aside, so that autograd saves the same tensors.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm._buffers["num_batches_tracked"] = None
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = num_batches_tracked
