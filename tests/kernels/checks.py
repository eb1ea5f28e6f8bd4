"""Inputs of kernels, and what their results are held to: the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locallearn.kernels.interface import (
    ChannelStats,
    Moments,
    PeriodicBasis,
    ScheduleFreeState,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> Tensor:
    # Drawn on the CPU, for the same numbers on every device.
    return torch.randn(shape).to(DEVICE)


def arrange(x: Tensor, layout: str) -> Tensor:
    """A copy; in memory that may be watched, but where it is strided."""
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    is_last = layout == "channels_last" and x.ndim == 4
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format).copy_(x)


def wide(values: Any) -> Any:
    """The same in float64, tensors in tuples included."""
    if isinstance(values, Tensor) and values.dtype.is_floating_point:
        return values.double()
    if isinstance(values, tuple):
        wider = [wide(v) for v in values]
        return type(values)(*wider) if hasattr(values, "_fields") else tuple(wider)
    return values


# In units of the dtype's eps: float32 tensors end sums that cancel, half ones are rounded once.
FLOORS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def check(
    actual: Sequence[Tensor | None],
    low: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    names: Sequence[str],
) -> None:
    """Each tensor is off by at most twice what the reference is off by in the same precision."""
    assert len(actual) == len(low) == len(exact) == len(names)
    for a, r, e, name in zip(actual, low, exact, names, strict=True):
        if e is None:
            assert a is None, name
            continue
        assert a is not None
        assert r is not None
        assert a.shape == e.shape, name
        assert a.dtype == r.dtype, name
        if not e.numel():
            continue
        if not e.dtype.is_floating_point:
            assert torch.equal(a, e), name
            continue
        error = (a.double() - e).abs().max().item()
        allowed = 2 * (r.double() - e).abs().max().item()
        floor = FLOORS[a.dtype] * torch.finfo(a.dtype).eps * e.abs().max().item()
        assert error <= allowed + floor, f"{name}: off by {error}, allowed {allowed} + {floor}"


def block_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> tuple[Tensor, ChannelStats, Tensor, Tensor]:
    z = arrange(randn(*shape).to(dtype), layout)
    c = shape[1]
    return z, ChannelStats(randn(c), randn(c).abs() + 0.5), randn(c), randn(c)


HEAD = [
    "loss",
    "num_correct",
    "logits",
    "grad_latents",
    "grad_gamma",
    "grad_beta",
    "grad_projection",
]


def head_inputs(shape: tuple[int, ...], num_classes: int) -> tuple[Moments, Tensor, Tensor, Tensor]:
    moments = Moments(randn(*shape).abs(), randn(*shape))
    if len(shape) == 4:
        moments = Moments(*(arrange(m, "channels_last") for m in moments))
    labels = torch.randint(num_classes, shape[:1]).to(DEVICE)
    return moments, randn(shape[1]), randn(shape[1]), labels


def official_basis(num_classes: int, length: int, *, is_square: bool) -> PeriodicBasis:
    turns = torch.linspace(50, 512, num_classes, dtype=torch.float64) / (2 * math.pi)
    basis = PeriodicBasis(turns, torch.zeros_like(turns), length, is_square)
    return basis._replace(turns=turns.to(DEVICE), first_phase=basis.first_phase.to(DEVICE))


def paper_basis(num_classes: int, length: int, *, is_square: bool) -> PeriodicBasis:
    """Cosines whose periods divide the latent: samples lie on zero crossings."""
    turns = torch.linspace(1, length / 2, num_classes, dtype=torch.float64) / length
    return PeriodicBasis(turns.to(DEVICE), (turns + 0.25).to(DEVICE), length, is_square)


SHAPES = [(3,), (), (4, 5), (8, 3, 3, 3), (6, 2, 1, 1), (2500,), (0, 4)]


class Trajectory:
    """Parameters and a state, stepped by an op in one dtype."""

    def __init__(self, op: object, dtype: torch.dtype, lr: float) -> None:
        self.op = op
        self.y = [arrange(p.to(DEVICE, dtype), "channels_last") for p in starts()]
        self.z = [torch.empty_like(p).copy_(p) for p in self.y]
        self.v = [torch.empty_like(p).zero_() for p in self.y]
        numbers = torch.tensor([0.0, 0.0, lr, 0.0], dtype=torch.float64, device=DEVICE)
        self.state = ScheduleFreeState(*(t.clone() for t in numbers))

    def step(self, gradients: list[Tensor], **options: object) -> None:
        gradients = [g.to(y.dtype) for g, y in zip(gradients, self.y, strict=True)]
        before = [g.clone() for g in gradients]
        self.op.schedulefree_step(self.y, gradients, self.z, self.v, self.state, **options)
        assert all(map(torch.equal, gradients, before))

    def tensors(self) -> list[Tensor]:
        return [*self.y, *self.z, *self.v]


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients_of(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]
    gradients[2] = gradients[2].T.contiguous().T  # not laid out like its parameter
    return gradients  # nor is the convolution's, which is channels-last
