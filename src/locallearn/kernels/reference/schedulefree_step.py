"""`schedulefree_step`; see `kernels.interface`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from locallearn.kernels.interface import ScheduleFreeState

# Values at a time: what the step holds for a moment then is some MiB, and not twice the largest
# parameter.
SLICE_VALUES = 2**18


def _slices(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The same rows of each of several tensors of one shape; all of them while it is compiled: what
    is compiled holds nothing in between, and the number of slices would be fixed."""
    first = tensors[0]
    if torch.compiler.is_compiling() or first.numel() <= SLICE_VALUES or first.ndim == 0:
        yield tensors
        return
    rows = max(1, SLICE_VALUES * len(first) // first.numel())
    for start in range(0, len(first), rows):
        yield [tensor[start : start + rows] for tensor in tensors]


def advance(
    state: ScheduleFreeState,
    *,
    beta1: float,
    beta2: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    averages_by_bias_correction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count the step; 0-d float64 tensors: c, lr, beta1 (1 - c) - 1 times lr, and bias2."""
    k = state.step + 1
    lr = state.lr * (k / warmup_steps).clamp_max(1.0) if warmup_steps else state.lr.clone()
    bias2 = 1 - beta2**k
    state.lr_max.copy_(torch.maximum(lr, state.lr_max))
    if averages_by_bias_correction:
        weight = lr**2 * bias2
    else:
        weight = k**r * state.lr_max**weight_lr_power
    state.weight_sum.add_(weight)
    # A rate of zero weighs nothing; the average then stays where it is.
    c = torch.where(state.weight_sum > 0, weight / state.weight_sum, 0.0)
    state.step.copy_(k)
    return c, lr, lr * (beta1 * (1 - c) - 1), bias2


@torch.no_grad()
def schedulefree_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    z: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    state: ScheduleFreeState,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    averages_by_bias_correction: bool = False,
) -> None:
    beta1, beta2 = betas
    c, lr, y_rate, bias2 = advance(
        state,
        beta1=beta1,
        beta2=beta2,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        averages_by_bias_correction=averages_by_bias_correction,
    )
    whole = zip(parameters, gradients, z, exp_avg_sq, strict=True)
    for y, gradient, z_i, v in itertools.chain.from_iterable(map(_slices, whole)):
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = gradient / (v / bias2.to(v.dtype)).sqrt_().add_(eps)
        if weight_decay:
            direction.add_(y, alpha=weight_decay)
        y.lerp_(z_i, c.to(y.dtype)).add_(direction * y_rate.to(y.dtype))
        z_i.sub_(direction * lr.to(y.dtype))
