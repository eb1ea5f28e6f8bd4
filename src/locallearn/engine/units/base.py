"""What a block with its head and its optimizer is, however it is updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.blocks import LatentSize, forwards_through, modules_of
from locallearn.engine.reduction import Updates
from locallearn.kernels import Kernels, load_kernels
from locallearn.rules import LocalHead


class UnitSignal(NamedTuple):
    """What a block's head says of a batch: loss, logits, how many are right; each may be None."""

    loss: Tensor | None
    logits: Tensor | None
    num_correct: Tensor | None


class UnitResult(NamedTuple):
    """What a block's step yields: its detached output, and what its head says."""

    output: Any
    signal: UnitSignal


class BlockUnit:
    """What every unit is.

    Arguments:
        name: of the block in the model.
        block: the module, or a chain of modules.
        head: the rule's, for this block; None where it has none.
        latent_size: s, or T for a block whose output is (N, F).
        optimizer: of the block's and the head's parameters; None where all are frozen.
        leaders: blocks that run before this one and learn with it, as one.
        updates: of the learner that it is of.

    Attributes:
        backend: whose kernels compute; the learner sets it.
        num_elements: values of z (generic: of the output) in the last step.
    """

    backend: str = "autograd"
    num_elements: int = 0

    @property
    def path(self) -> str:
        """ "closed form" or "generic"."""
        return "generic"

    @property
    def has_loss(self) -> bool:
        """Whether the head has a local loss."""
        return isinstance(self.head, LocalHead) and self.head.has_loss

    def __init__(
        self,
        *,
        name: str,
        block: nn.Module,
        head: nn.Module | None,
        latent_size: LatentSize,
        optimizer: Optimizer | None,
        leaders: Sequence[nn.Module] = (),
        updates: Updates | None = None,
    ) -> None:
        self.name = name
        self.block = block
        self.head = head
        self.latent_size = latent_size
        self.optimizer = optimizer
        self.leaders = tuple(leaders)
        self.updates = Updates() if updates is None else updates

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All of the model's modules that learn here, in the order of the forward."""
        return tuple(m for block in (*self.leaders, self.block) for m in modules_of(block))

    @property
    def kernels(self) -> Kernels:
        """The ops of the backend."""
        return load_kernels(self.backend)

    def step(self, labels: Tensor, *args: Any, **kwargs: Any) -> UnitResult:
        """Forward and update."""
        raise NotImplementedError

    def forwards(self, step: Callable[..., Any]) -> dict[nn.Module, Callable[..., Any]]:
        """Module -> what stands in for its forward in a training step.

        Arguments:
            step: for the block itself.
        """
        return forwards_through(self.block, step)

    def abandon(self) -> None:
        """Forget what a step that failed has left."""

    def _update(self) -> None:
        if self.optimizer is not None:
            self.updates.step(self.optimizer)


def num_correct(logits: Tensor | None, labels: Tensor) -> Tensor | None:
    return None if logits is None else (logits.argmax(dim=1) == labels).sum()
