"""Modules that run one straight after the other, as one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from locallearn.engine.blocks.standing_in import bound_forward


class Chain(nn.Module):
    """Layers which a model holds side by side, and runs each on the output of the one before.

    A view of the model's own modules: it is no part of the model. The forwards are those of the
    moment it is made, so that it runs whatever stands in for the modules in the model.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._forwards = [bound_forward(member) for member in members]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self._forwards
        output = first(*args, **kwargs)
        for forward in others:
            output = forward(output)
        return output


def modules_of(block: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of the model that a block is: itself, or a chain's."""
    return tuple(block.members) if isinstance(block, Chain) else (block,)


def forwards_through(
    block: nn.Module, run: Callable[..., Any]
) -> dict[nn.Module, Callable[..., Any]]:
    """Module -> forward, where ``run`` stands for a block: of a chain, the first module runs it
    all, and the others pass on what they get."""
    first, *others = modules_of(block)
    return {**dict.fromkeys(others, _pass_on), first: run}


def _pass_on(x: Any) -> Any:
    return x
