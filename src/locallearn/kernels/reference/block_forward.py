"""`block_forward`; see `kernels.interface`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from locallearn.kernels.interface import BlockForward, ChannelStats, Moments
from locallearn.kernels.reference.channel_stats import per_channel


def normalized(z: Tensor, stats: ChannelStats) -> Tensor:
    """xh, in the statistics' dtype."""
    mean, inv_std = (per_channel(t, z) for t in stats)
    return (z.to(mean.dtype) - mean) * inv_std


def slope_of(
    xh: Tensor, gamma: Tensor, beta: Tensor, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """v and d."""
    v = per_channel(gamma, xh) * xh + per_channel(beta, xh)
    return v, (v > 0).to(v.dtype) * (1 - negative_slope) + negative_slope


def block_forward(
    z: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
    latent_size: int | None,
    max_pool: int = 1,
) -> BlockForward:
    xh = normalized(z, stats)
    v, d = slope_of(xh, gamma, beta, negative_slope)
    output = v * d
    if max_pool > 1:
        output = F.max_pool2d(output, max_pool)
    moments = None
    if latent_size is not None:
        moments = Moments(d, d * xh)
        if z.ndim == 4:
            moments = Moments(*(F.adaptive_avg_pool2d(each, latent_size) for each in moments))
    return BlockForward(output.to(z.dtype), moments)
