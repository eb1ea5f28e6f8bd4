"""`block_backward` and `norm_backward`; see `kernels.interface`."""

from __future__ import annotations

from torch import Tensor

from locallearn.kernels.interface import ChannelStats, NormGradient
from locallearn.kernels.latents import unpool_latents
from locallearn.kernels.reference.block_forward import normalized, slope_of
from locallearn.kernels.reference.channel_stats import per_channel


def block_backward(
    z: Tensor,
    grad_latents: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    *,
    negative_slope: float,
) -> Tensor:
    xh = normalized(z, stats)
    _, d = slope_of(xh, gamma, beta, negative_slope)
    grad_h = grad_latents
    if z.ndim == 4:
        grad_h = unpool_latents(grad_latents.flatten(1), xh, grad_latents.shape[-1])
    return z.copy_(_grad_z(xh, d * grad_h, stats, gamma, grad_gamma, grad_beta))


def norm_backward(
    z: Tensor,
    grad_output: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
) -> NormGradient:
    xh = normalized(z, stats)
    _, d = slope_of(xh, gamma, beta, negative_slope)
    grad_v = d * grad_output.to(d.dtype)
    axes = [0, *range(2, z.ndim)]
    grad_beta, grad_gamma = grad_v.sum(axes), (grad_v * xh).sum(axes)
    grad_z = z.copy_(_grad_z(xh, grad_v, stats, gamma, grad_gamma, grad_beta))
    return NormGradient(grad_z, grad_gamma, grad_beta)


def _grad_z(
    xh: Tensor,
    grad_v: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
) -> Tensor:
    num_values = xh.numel() // xh.shape[1]
    mean_grad = per_channel(grad_beta, xh) + xh * per_channel(grad_gamma, xh)
    return per_channel(gamma * stats.inv_std, xh) * (grad_v - mean_grad / num_values)
