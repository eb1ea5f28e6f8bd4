"""A block of any make, updated by autograd inside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from locallearn.engine.blocks import (
    PLAIN,
    Layout,
    bound_forward,
    cut_at_head,
    forwards_through,
    output_place,
    replaced,
)
from locallearn.engine.units.base import (
    BlockUnit,
    UnitResult,
    UnitSignal,
    num_correct,
)
from locallearn.errors import UserError
from locallearn.kernels import pool_latents, unpool_latents
from locallearn.rules import LatentHead, LocalHead

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class GenericUnit(BlockUnit):
    """Autograd inside the block; nothing of it is left afterwards.

    With leaders, the graph begins at the input of the first of them. With parameters that lie in
    no block and are read by this one, it begins at these.

    Arguments:
        layout: how the block's output lies.
        reads_loose: whether the graphs of its inputs lead to parameters that lie in no block, which
            then learn with it. No other graph comes in: what a block hands on has none.
        compile_block: run the block's forward and backward through torch.compile.
        head_after_pool: the head reads what the block hands on, after its max-pool.
    """

    def __init__(
        self,
        *,
        layout: Layout = PLAIN,
        reads_loose: bool = False,
        compile_block: bool = False,
        head_after_pool: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.layout = layout
        self._reads_loose = reads_loose
        # Bound here, while the blocks' own forwards are in place.
        halves = cut_at_head(self.block, head_after_pool=head_after_pool)
        self._activation: Callable[..., Any] = halves.activation
        # Batches of inference come in any size, for each of which one would be compiled.
        self._infer_activation = halves.activation
        self._downsample = halves.downsample
        self._leading: list[Callable[..., Any]] = [bound_forward(leader) for leader in self.leaders]
        # Leaders that have run in this step: number, output, and the leaf that the model was given.
        self._led: list[tuple[int, Tensor, Tensor]] = []
        if compile_block:
            self._activation = torch.compile(self._activation)
            self._leading = [torch.compile(forward) for forward in self._leading]

    def forwards(self, step: Callable[..., Any]) -> dict[nn.Module, Callable[..., Any]]:
        self._led = []
        forwards = super().forwards(step)
        for number, leader in enumerate(self.leaders):
            forwards |= forwards_through(leader, self._lead(number))
        return forwards

    def _lead(self, number: int) -> Callable[..., Any]:
        forward = self._leading[number]

        def run(*args: Any, **kwargs: Any) -> Any:
            if number == 0:
                args, kwargs = self._entering(args, kwargs)
            output = forward(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise UserError(
                    f"a block that learns together with {self.name!r} returns "
                    f"{type(output).__name__}; what group_blocks joins must hand on one tensor."
                )
            # The graph goes on from a leaf, so that what else reads the output, as a skip around
            # the next block does, leads into no block.
            leaf = output.detach().requires_grad_()
            self._led.append((number, output, leaf))
            return leaf

        return run

    def _entering(self, args: Any, kwargs: Any) -> Any:
        """The inputs, from which no graph leads into another block."""
        if self._reads_loose:
            return args, kwargs
        return tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def step(self, labels: Tensor, *args: Any, **kwargs: Any) -> UnitResult:
        activation, output = self.run(len(labels), *args, **kwargs)
        hidden = activation.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            signal, grad = self._signal_of(hidden, labels)
            # A graph that leads to what lies in no block may be walked by another block too.
            keeps_graph = self._reads_loose and _has_graph((args, kwargs))
            self.backward(activation, grad, keeps_graph=keeps_graph)
            del activation, grad
            self._update()
        return UnitResult(output, signal)

    def run(self, num_images: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The view of what the head reads, with its graph, which ends at the block's (or group's)
        input, and what the block hands on, without one. In training."""
        if [number for number, _, _ in self._led] != list(range(len(self.leaders))):
            raise UserError(
                f"the {len(self.leaders) + 1} blocks that learn together up to {self.name!r} do "
                f"not run one after the other in the order in which the model holds them. Name "
                f"blocks in the order of the forward, or leave out group_blocks."
            )
        if not self.leaders:
            args, kwargs = self._entering(args, kwargs)
        view, handed_on = self._read(num_images, self._activation(*args, **kwargs))
        self.num_elements = view.numel()
        return view, handed_on

    def infer(self, num_images: int, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any]:
        """The local logits, (N, K), and what the block hands on; logits are None of a head that
        has none. For inference: in evaluation mode, without a graph."""
        assert isinstance(self.head, LocalHead)
        view, handed_on = self._read(num_images, self._infer_activation(*args, **kwargs))
        if not torch.is_autocast_enabled(view.device.type):  # asking is cheaper than entering
            return self.head.logits(self._seen(view)), handed_on
        with torch.autocast(view.device.type, enabled=False):
            return self.head.logits(self._seen(view)), handed_on

    def _read(self, num_images: int, output: Any) -> tuple[Tensor, Any]:
        """The view of what the head reads, and what the block hands on, without a graph."""
        if isinstance(output, Tensor):
            read, handed_on = output, self._hand_on(output.detach())
        else:
            place = output_place(output, self.name)
            read = tree_leaves(output)[place]
            handed_on = replaced(output, place, read.detach())
        num_entries = read.shape[self.layout.batch_dim]
        if num_entries == 0 or num_entries % num_images != 0:
            raise UserError(
                f"block {self.name!r} yields shape {tuple(read.shape)} for {num_images} images: "
                f"no entry for each of them, as when only some are sent through it. Choose other "
                f"blocks (blocks=[...]), such as the module around it."
            )
        return self.layout.view(read, num_images), handed_on

    def _hand_on(self, hidden: Tensor) -> Tensor:
        """The block's output, of what the head reads."""
        if self._downsample is None:
            return hidden
        with torch.no_grad():
            return self._downsample(hidden)

    def backward(self, activation: Tensor, grad: Tensor, *, keeps_graph: bool = False) -> None:
        """To the block's input, or through every block of a group to that of the first."""
        for _, _, leaf in self._led:
            leaf.grad = None  # of what else has read it
        if activation.requires_grad:
            activation.backward(grad, retain_graph=keeps_graph)  # type: ignore[no-untyped-call]
        for _, output, leaf in reversed(self._led):
            if leaf.grad is None:
                raise UserError(
                    f"block {self.name!r} does not depend on a block that is to learn together "
                    f"with it: what group_blocks joins must be a chain. Leave it out, or name "
                    f"other blocks."
                )
            if output.requires_grad:
                output.backward(  # type: ignore[no-untyped-call]
                    leaf.grad, retain_graph=self._reads_loose
                )
        self._led = []

    def abandon(self) -> None:
        self._led = []

    def _signal_of(self, hidden: Tensor, labels: Tensor) -> tuple[UnitSignal, Tensor]:
        """What the head says, and dL/dh in h's dtype."""
        assert isinstance(self.head, LocalHead)
        loss, logits, grad = self.head.signal(self._seen(hidden), labels)
        if isinstance(self.head, LatentHead):
            grad = unpool_latents(grad, hidden, self.latent_size)
        return UnitSignal(loss, logits, num_correct(logits, labels)), grad.to(hidden.dtype)

    def _seen(self, hidden: Tensor) -> Tensor:
        """What the head is given of h: its pooled latents or all of it, not below float32."""
        is_latent = isinstance(self.head, LatentHead)
        seen = pool_latents(hidden, self.latent_size) if is_latent else hidden
        return seen.float() if seen.dtype in _LOW_PRECISION else seen


def _has_graph(inputs: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))
