"""What the blocks of a model are, and what each of them costs, before any training.

Counted in one forward of a copy of the model, in training mode, with its blocks cut off from each
other. MACs are those of matrix products, convolutions and attention (torch's own counter). Memory
is what autograd keeps for a block's backward, its input and its output included; of the closed
form, its input, the layer's output and the block's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from locallearn.engine.blocks import (
    BlockPlan,
    Blocks,
    ClosedForm,
    Inputs,
    NetworkPlan,
    call_model,
    forwards_through,
    num_inputs,
    plan_blocks,
    standing_in,
)

_CLOSED_FORM, _GENERIC = "closed form", "generic"


@dataclass(frozen=True)
class BlockCost:
    """A block, and what it costs.

    Attributes:
        name: in the model.
        modules: names of its modules in the model: one, or a chain.
        kind: class of its module; of a chain, of each of its modules.
        path: "closed form" or "generic": how a rule that reads pooled latents updates it.
        num_params: of its own and of what learns with it, trained ones alone.
        num_macs: of the forward, of one image.
        activation_bytes: that its step keeps, of a batch of the size asked for.
        latent_length: T.
        joined: names of the parameters in no block that learn with it.
    """

    name: str
    modules: tuple[str, ...]
    kind: str
    path: str
    num_params: int
    num_macs: int
    activation_bytes: int
    latent_length: int
    joined: tuple[str, ...]


@dataclass(frozen=True)
class ModelCost:
    """The blocks of a model, and the whole.

    Attributes:
        blocks: in the order of the forward.
        output: names of the parameters that learn from the logits.
        shared: names of those that several of all these read.
        untrained: names of trainable parameters that no block and no logits read.
        num_params: of the model, trained ones alone.
        num_output_params: of the output layer.
        num_macs: of the forward, of one image.
        backprop_bytes: that backpropagation keeps, of a batch of the size asked for.
    """

    blocks: tuple[BlockCost, ...]
    output: tuple[str, ...]
    shared: tuple[str, ...]
    untrained: tuple[str, ...]
    num_params: int
    num_output_params: int
    num_macs: int
    backprop_bytes: int

    @property
    def local_bytes(self) -> int:
        """What local learning keeps at most: the largest block's."""
        return max(block.activation_bytes for block in self.blocks)


def count_blocks(
    model: nn.Module,
    images: Inputs,
    *,
    blocks: Blocks = "auto",
    num_classes: int | None = None,
    batch_size: int = 128,
    allow_reuse: bool = False,
) -> ModelCost:
    """The blocks of a model and their costs.

    Arguments:
        model: any module; stays as it is.
        images: a batch of two or more, as the model takes it.
        blocks, num_classes, allow_reuse: as of `engine.blocks.plan_blocks`.
        batch_size: for which memory is told, in proportion to what the images take.

    Raises:
        UserError: as `plan_blocks`.
    """
    model = copy.deepcopy(model)
    plan = plan_blocks(
        model, blocks, inputs=images, num_classes=num_classes, allow_reuse=allow_reuse
    )
    num_images = num_inputs(images)
    counter = _Counter(model, plan)
    model.train()
    macs, whole = _count(lambda: call_model(model, images), counter.parameters)
    with standing_in(counter.forwards()):
        call_model(model, images)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    costs = []
    for block in plan.blocks:
        kept = counter.kept.get(block.name, 0)
        held = {id(p): p for p in block.module.parameters() if p.requires_grad}
        num_params = sum(p.numel() for p in held.values())
        num_params += sum(named[name].numel() for name in block.joined if name in named)
        costs.append(
            BlockCost(
                block.name,
                block.names,
                " + ".join(type(member).__name__ for member in block.members),
                counter.path(block.name),
                num_params,
                counter.macs.get(block.name, 0) // num_images,
                kept * batch_size // num_images,
                _latent_length(block),
                block.joined,
            )
        )
    in_blocks = {id(p) for block in plan.blocks for p in block.module.parameters()}
    joined = {name for block in plan.blocks for name in block.joined}
    output = plan.output or tuple(_behind(model, in_blocks))
    known = joined | set(output) | set(plan.shared)
    return ModelCost(
        tuple(costs),
        output=output,
        shared=plan.shared,
        untrained=tuple(n for n, p in named.items() if n not in known and id(p) not in in_blocks),
        num_params=sum(p.numel() for p in named.values()),
        num_output_params=sum(named[name].numel() for name in output if name in named),
        num_macs=macs // num_images,
        backprop_bytes=whole * batch_size // num_images,
    )


class _Counter:
    """Runs each block by itself, and notes what it computes and keeps."""

    def __init__(self, model: nn.Module, plan: NetworkPlan) -> None:
        self._plan = plan
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.parameters |= {b.untyped_storage().data_ptr() for b in model.buffers()}
        self.macs: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        # Now, while the blocks' own forwards are in place.
        self._forms = {block.name: block.closed_form() for block in plan.blocks}

    def path(self, name: str) -> str:
        """Of a block: "closed form" or "generic"."""
        return _GENERIC if self._forms[name] is None else _CLOSED_FORM

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for block in self._plan.blocks:
            forwards |= forwards_through(block.module, self._counting(block))
        return forwards

    def _counting(self, block: BlockPlan) -> Callable[..., Any]:
        inner = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not block.reads_loose:
                args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            outputs: list[Any] = []
            macs, kept = _count(lambda: outputs.append(inner(*args, **kwargs)), self.parameters)
            output = tree_map_only(Tensor, Tensor.detach, outputs[0])
            form = self._forms[block.name]
            if form is None:
                kept += _num_bytes(tree_leaves(output))
            else:
                kept = _kept_in_closed_form(form, (args, kwargs), output)
            self.macs[block.name] = self.macs.get(block.name, 0) + macs
            self.kept[block.name] = max(self.kept.get(block.name, 0), kept)
            return output

        return forward


def _kept_in_closed_form(form: ClosedForm, inputs: Any, output: Tensor) -> int:
    """Bytes of the block's input and output, and of what its layers yield in between."""
    z = output.numel() * form.max_pool**2 * output.element_size()
    kept = _num_bytes(tree_leaves(inputs)) + z + output.numel() * output.element_size()
    if form.inner is not None:
        (x,) = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        inner = form.inner.layer(x)
        kept += 2 * inner.numel() * inner.element_size()
    return kept


def _count(run: Callable[[], Any], known: set[int]) -> tuple[int, int]:
    """MACs of a forward, and the bytes that autograd keeps of it, what is known left out."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.enable_grad(),
        saved_tensors_hooks(note, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        result = run()
    del result
    return counter.get_total_flops() // 2, sum(kept.values())


def _num_bytes(leaves: Iterable[Any]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _latent_length(block: BlockPlan) -> int:
    if block.view_shape is None:
        return int(getattr(block.module, "latent_length", 0))
    return block.latent_size()[1]


def _behind(model: nn.Module, in_blocks: set[int]) -> Iterable[str]:
    """Of the package's own networks: what lies in no block."""
    return (n for n, p in model.named_parameters() if p.requires_grad and id(p) not in in_blocks)
