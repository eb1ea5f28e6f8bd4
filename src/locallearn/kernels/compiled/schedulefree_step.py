"""`schedulefree_step`; see `kernels.interface`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locallearn.kernels.compiled.compilation import specialized
from locallearn.kernels.interface import ScheduleFreeState
from locallearn.kernels.reference.schedulefree_step import schedulefree_step as reference
from locallearn.kernels.storage_order import in_storage_order

_LARGE = 2**15  # values


def _schedulefree_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    z: list[Tensor],
    exp_avg_sq: list[Tensor],
    state: ScheduleFreeState,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    averages_by_bias_correction: bool,
) -> None:
    reference(
        parameters,
        gradients,
        z,
        exp_avg_sq,
        state,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        averages_by_bias_correction=averages_by_bias_correction,
    )


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
    flat = [
        [in_storage_order(t, p) for t, p in zip(tensors, parameters, strict=True)]
        for tensors in (parameters, gradients, z, exp_avg_sq)
    ]
    # One compilation for every block with as many parameters, whatever their sizes; but another for
    # the large ones, as loops are spread over threads, or not, by the sizes first compiled for.
    is_large = sum(map(len, flat[0])) >= _LARGE
    for tensor in (t for tensors in flat for t in tensors):
        if len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
    settings = (betas, eps, weight_decay, warmup_steps, r, weight_lr_power)
    dtypes = [p.dtype for p in parameters]
    key = (len(parameters), *dtypes, is_large, *settings, averages_by_bias_correction)
    y, gradient, z_flat, v = flat
    specialized(_schedulefree_step, *key)(
        y, gradient, z_flat, v, state, *settings, averages_by_bias_correction
    )
