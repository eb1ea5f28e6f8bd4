"""Random numbers of a training step that do not depend on who computes what.

Dropout and the like draw from torch's default generators, one after the other, so that a block's
mask depends on all blocks before it, and on every step before. Here the generators are seeded anew
whenever the forward comes to a block, by where it is: (seed, epoch, step, call, block). So a run
that is resumed draws what it would have drawn, and so does a process that trains a part of the
blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# A place of an epoch that is no step: the forwards that BatchNorm's statistics are measured on.
RECALIBRATION = -1

_MASK = 2**64 - 1


class RandomStreams:
    """The random numbers of a model's forwards, each block's a stream of its own.

    Arguments:
        model: each of its calls begins the stream of what lies before the first block; None of one
            that learns as a whole, and may be compiled as a whole.
        firsts: the first module of each block, in any fixed order, the same in all processes.
        seed: of the run.
        replica: differs between processes that train the same blocks on other images.
        device: whose generator is seeded, besides the CPU's.
    """

    def __init__(
        self,
        model: nn.Module | None,
        firsts: Sequence[nn.Module],
        *,
        seed: int,
        replica: int = 0,
        device: torch.device,
    ) -> None:
        self._seed = (seed, replica)
        self._place = 0
        self._call = 0
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        elif device.type == "mps":
            self._generators.append(torch.mps._get_default_mps_generator())
        self._handles: list[RemovableHandle] = []
        if model is not None:
            self._handles.append(model.register_forward_pre_hook(self._on_call))
        for number, module in enumerate(firsts, start=1):
            self._handles.append(module.register_forward_pre_hook(self._seeding(number)))

    def close(self) -> None:
        """The model's forwards draw as ever."""
        for handle in self._handles:
            handle.remove()

    def begin(self, epoch: int, step: int) -> None:
        """What follows is this step of this epoch, or RECALIBRATION."""
        self._place = mixed(*self._seed, epoch, step & _MASK)
        self._call = 0
        self._draw_from(0)

    def _on_call(self, module: nn.Module, args: Any) -> None:
        if module.training:
            self._call += 1
            self._draw_from(0)

    def _seeding(self, number: int) -> Any:
        def seed(module: nn.Module, args: Any) -> None:
            if module.training:
                self._draw_from(number)

        return seed

    def _draw_from(self, number: int) -> None:
        seed = mixed(self._place, self._call, number)
        for generator in self._generators:
            generator.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """One number of 63 bits made of several, each of which changes all of it (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
