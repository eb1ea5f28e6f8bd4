"""`channel_stats`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.interface import ChannelStats


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and everything small are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) so that it broadcasts over (N, C, H, W) or (N, C)."""
    return values.view(-1, *[1] * (like.ndim - 2))


def update_running(
    mean: Tensor,
    var: Tensor,
    num_values: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> None:
    """BatchNorm's moving averages, in place; ``var`` is the biased variance of the batch."""
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = var * (num_values / (num_values - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def channel_stats(
    z: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float,
    momentum: float = 0.1,
) -> ChannelStats:
    axes = [0, *range(2, z.ndim)]
    var, mean = torch.var_mean(z.to(wide(z.dtype)), dim=axes, correction=0)
    update_running(mean, var, z.numel() // z.shape[1], running_mean, running_var, momentum)
    return ChannelStats(mean, torch.rsqrt(var + eps))
