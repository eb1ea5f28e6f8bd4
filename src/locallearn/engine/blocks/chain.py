"""Modules that run one straight after the other, as one block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Chain(nn.Module):
    """Layers which a model holds side by side, and runs each on the output of the one before.

    A view of the model's own modules: it is no part of the model. The forwards are those of the
    moment it is made, so that it runs whatever stands in for the modules in the model.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._forwards = [member.forward for member in members]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self._forwards
        output = first(*args, **kwargs)
        for forward in others:
            output = forward(output)
        return output


def passing(x: Any) -> Any:
    """What stands in for the forward of all but a chain's first module, which has run them all."""
    return x
