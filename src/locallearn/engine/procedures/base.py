"""What the procedures share: standing in for blocks, and the layer that lies in none.

Shapes: N batch, K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.units import UnitSignal


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

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome: ...


class OutputLayer:
    """What lies in no block: it learns from the cross-entropy of the logits.

    Arguments:
        parameters: name -> what lies in no block and is to be trained.
        optimizer: of these; None where there are none.
        label_smoothing: of the cross-entropy.
        is_behind_blocks: whether blocks cut the way back, so that a parameter before the last of
            them is not reached; the user is told once.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer | None,
        *,
        label_smoothing: float,
        is_behind_blocks: bool,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self._warns = is_behind_blocks

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits that are not below float32."""
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
        if self.optimizer is None or not outputs.requires_grad:
            return
        outputs.backward(gradient)  # type: ignore[no-untyped-call]
        if self._warns:
            self._warn_of_the_unreached()
            self._warns = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _warn_of_the_unreached(self) -> None:
        unreached = [name for name, p in self.parameters.items() if p.grad is None]
        if unreached:
            warnings.warn(
                f"no block holds {', '.join(unreached)}, and the output's gradient does not reach "
                f"across the blocks behind: they will not train. Name a block that holds them.",
                stacklevel=3,
            )


def not_below_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within: calling one of these modules calls what is given for it instead of its forward."""
    # Through __dict__: an instance attribute hides the class's forward, and nn.Module's own
    # __setattr__ would cost more than it does for us. What another library put there comes back.
    before: list[Any] = [module.__dict__.get("forward") for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in zip(forwards, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


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
