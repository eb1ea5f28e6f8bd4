"""A block of any make, updated by autograd inside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from locallearn.engine.units.base import BlockUnit, UnitResult, UnitSignal, num_correct
from locallearn.errors import UserError
from locallearn.kernels import pool_latents, unpool_latents
from locallearn.models import Block
from locallearn.rules import LatentHead, LocalHead

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class GenericUnit(BlockUnit):
    """Autograd inside the block; nothing of it is left afterwards.

    With leaders, the graph begins at the input of the first of them.

    Arguments:
        compile_block: run the block's forward and backward through torch.compile.
        head_after_pool: the head reads what the block hands on, after its max-pool.
    """

    def __init__(
        self, *, compile_block: bool = False, head_after_pool: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        # Bound here, while the blocks' own forwards are in place.
        if isinstance(self.block, Block) and not head_after_pool:
            self._activation: Callable[..., Any] = self.block.activation
            self._downsample: Callable[[Tensor], Tensor] | None = self.block.downsample
        else:
            self._activation = self.block.forward
            self._downsample = None
        self._leading: list[Callable[..., Any]] = [leader.forward for leader in self.leaders]
        # Leaders that have run in this step: number, output, and the leaf that the model was given.
        self._led: list[tuple[int, Tensor, Tensor]] = []
        if compile_block:
            self._activation = torch.compile(self._activation)
            self._leading = [torch.compile(forward) for forward in self._leading]

    def leading_forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        self._led = []
        return {leader: self._lead(number) for number, leader in enumerate(self.leaders)}

    def _lead(self, number: int) -> Callable[..., Any]:
        forward = _detaching(self._leading[number]) if number == 0 else self._leading[number]

        def run(*args: Any, **kwargs: Any) -> Tensor:
            output = self._checked(forward(*args, **kwargs))
            # The graph goes on from a leaf, so that what else reads the output, as a skip around
            # the next block does, leads into no block.
            leaf = output.detach().requires_grad_()
            self._led.append((number, output, leaf))
            return leaf

        return run

    def step(self, labels: Tensor, *args: Any, **kwargs: Any) -> UnitResult:
        activation = self.run(*args, **kwargs)
        hidden = activation.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            signal, grad = self._signal_of(hidden, labels)
            self.backward(activation, grad)
            del activation, grad
            self._update()
        return UnitResult(self.hand_on(hidden), signal)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the head reads, with its graph, which ends at the block's (or group's) input."""
        if [number for number, _, _ in self._led] != list(range(len(self.leaders))):
            raise UserError(
                f"the {len(self.leaders) + 1} blocks that learn together up to {self.name!r} do "
                f"not run one after the other in the order in which the model holds them. Name "
                f"blocks in the order of the forward, or leave out group_blocks."
            )
        forward = self._activation if self.leaders else _detaching(self._activation)
        activation = self._checked(forward(*args, **kwargs))
        self.num_elements = activation.numel()
        return activation

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise UserError(
                f"block {self.name!r} returns {type(output).__name__}; a block's output must "
                f"be one tensor."
            )
        return output

    def backward(self, activation: Tensor, grad: Tensor) -> None:
        """To the block's input, or through every block of a group to that of the first."""
        for _, _, leaf in self._led:
            leaf.grad = None  # of what else has read it
        if activation.requires_grad:
            activation.backward(grad)  # type: ignore[no-untyped-call]
        for _, output, leaf in reversed(self._led):
            if leaf.grad is None:
                raise UserError(
                    f"block {self.name!r} does not depend on a block that is to learn together "
                    f"with it: what group_blocks joins must be a chain. Leave it out, or name "
                    f"other blocks."
                )
            if output.requires_grad:
                output.backward(leaf.grad)  # type: ignore[no-untyped-call]
        self._led = []

    def abandon(self) -> None:
        self._led = []

    def hand_on(self, hidden: Tensor) -> Tensor:
        """The block's output, of what the head reads."""
        if self._downsample is None:
            return hidden
        with torch.no_grad():
            return self._downsample(hidden)

    def _signal_of(self, hidden: Tensor, labels: Tensor) -> tuple[UnitSignal, Tensor]:
        """What the head says, and dL/dh in h's dtype."""
        assert isinstance(self.head, LocalHead)
        is_latent = isinstance(self.head, LatentHead)
        seen = pool_latents(hidden, self.latent_size) if is_latent else hidden
        if seen.dtype in _LOW_PRECISION:
            seen = seen.float()
        loss, logits, grad = self.head.signal(seen, labels)
        if is_latent:
            grad = unpool_latents(grad, hidden, self.latent_size)
        return UnitSignal(loss, logits, num_correct(logits, labels)), grad.to(hidden.dtype)


def _detaching(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, of inputs that no graph leads out of."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return forward(*args, **kwargs)

    return run
