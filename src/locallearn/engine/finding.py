"""Which modules of a model are its blocks, and what latents fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.errors import UserError
from locallearn.models import Block
from locallearn.rules import Backprop, HeadSpec, Rule

# Local heads see a block's output pooled to at most this many values (as in the authors' code).
_MAX_LATENT_LENGTH = 2048
_MAX_LATENT_SIZE = 4


def find_blocks(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if names is None:
        blocks: dict[str, nn.Module] = {
            name: module for name, module in modules.items() if isinstance(module, Block)
        }
        if not blocks:
            raise UserError(
                f"{type(model).__name__} holds no locallearn block. Name the modules that are to "
                f"learn locally: blocks=[...], names as in model.named_modules()."
            )
        return blocks
    if not names:
        raise UserError("blocks=[] names no block; leave it out, or use rule 'bp'.")
    for name in names:
        if name not in modules:
            raise UserError(f"the model has no module {name!r}; see model.named_modules().")
    ordered = sorted(set(names), key=list(modules).index)
    for outer in ordered:
        for inner in ordered:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise UserError(f"block {inner!r} lies inside block {outer!r}; name one of them.")
    return {name: modules[name] for name in ordered}


def output_shapes(
    model: nn.Module, blocks: dict[str, nn.Module], example_input: Tensor | None
) -> dict[str, torch.Size]:
    """Block name -> shape of its output, read from one forward in evaluation mode."""
    if example_input is None:
        raise UserError(
            f"blocks {', '.join(map(repr, blocks))} are not locallearn's own; give an "
            f"example_input, from which the shapes of their outputs are read."
        )
    shapes: dict[str, torch.Size] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = output.shape

        return hook

    handles = [block.register_forward_hook(record(name)) for name, block in blocks.items()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example_input)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for name in blocks:
        if name not in shapes:
            raise UserError(f"block {name!r} yields no tensor in the model's forward.")
    return shapes


def count_normalized(model: nn.Module, example_input: Tensor) -> tuple[int, int]:
    """How many locallearn blocks there are, and how many values their BatchNorms see."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.append(inputs[0].numel())

    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.register_forward_pre_hook(count)
    with torch.no_grad():
        model.eval()(example_input)
    return len(blocks), sum(counts)


def find_checkpointed(model: nn.Module, names: Sequence[str] | None, rule: Rule) -> list[nn.Module]:
    """The blocks that bp runs again in its backward; none unless it is to checkpoint."""
    if not isinstance(rule, Backprop) or rule.bp_memory != "checkpoint":
        return []
    return list(find_blocks(model, names).values())


def grouped(
    blocks: Sequence[tuple[str, nn.Module]], size: int
) -> list[Sequence[tuple[str, nn.Module]]]:
    """So many blocks at a time; the last group may have fewer."""
    if size < 1:
        raise UserError(f"group_blocks must be at least 1, got {size}.")
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]


def head_spec(
    name: str,
    block: nn.Module,
    num_classes: int,
    dtype: torch.dtype,
    shape: torch.Size | None,
) -> HeadSpec:
    """What a block's head must fit.

    Arguments:
        name: of the block.
        block: the module.
        num_classes: K.
        dtype: of the head.
        shape: of the output; needed of a block that is not the package's own.
    """
    if isinstance(block, Block):
        return HeadSpec(
            block.latent_length,
            num_classes,
            block.basis_length,
            dtype,
            latent_size=block.latent_size,
            num_channels=block.out_channels,
            is_linear=block.is_linear,
        )
    assert shape is not None
    latent_size, latent_length = latent_shape(name, shape)
    return HeadSpec(
        latent_length,
        num_classes,
        None,
        dtype,
        latent_size=latent_size,
        num_channels=shape[1],
        is_linear=len(shape) == 2,
    )


def latent_shape(name: str, shape: torch.Size) -> tuple[int, int]:
    """(latent_size, latent_length) for a block whose output has this shape."""
    if len(shape) == 2:
        length = min(shape[1], _MAX_LATENT_LENGTH)
        return length, length
    if len(shape) != 4:
        raise UserError(
            f"block {name!r} yields shape {tuple(shape)}; (N, C, H, W) or (N, F) is expected."
        )
    channels, height, width = shape[1:]
    size = min(_MAX_LATENT_SIZE, height, width)
    while size > 1 and channels * size**2 > _MAX_LATENT_LENGTH:
        size //= 2
    return size, channels * size**2
