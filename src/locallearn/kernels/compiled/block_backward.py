"""`block_backward` and `norm_backward`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.compiled.block_forward import parts
from locallearn.kernels.compiled.cells import Holders, holders, is_even, split, spread
from locallearn.kernels.compiled.compilation import (
    open_batch,
    open_rows,
    overwrite,
    rows_of,
    specialized,
)
from locallearn.kernels.interface import ChannelStats, NormGradient


def _block_backward(
    rows: Tensor,
    grad_latents: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
    beta: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    negative_slope: float,
    overlapping: tuple[Holders, Holders] | None,
) -> None:
    num_values = rows.numel() // rows.shape[-1]
    grad_h = grad_latents
    if overlapping is not None:
        grad_h = spread(grad_latents, *overlapping)
    elif rows.ndim == 4:
        n, size, _, channels = grad_latents.shape
        cell_size = rows.shape[1] * rows.shape[2] // size**2
        grad_h = (grad_latents / cell_size).view(n, size, 1, size, 1, channels)
        rows = split(rows, size)
    xh, _, d = parts(rows, ChannelStats(mean, inv_std), gamma, beta, negative_slope)
    mean_grad = grad_beta / num_values + xh * (grad_gamma / num_values)
    rows.copy_(gamma * inv_std * (d * grad_h - mean_grad))


@torch.no_grad()
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
    rows, grad = rows_of(z).contiguous(), rows_of(grad_latents).contiguous()
    overlapping = None
    if z.ndim == 4 and not is_even(rows.shape[1], rows.shape[2], grad.shape[1]):
        height, width = (
            holders(length, grad.shape[1], grad.device, grad.dtype) for length in rows.shape[1:3]
        )
        overlapping = (height, width)
    open_batch(rows, grad)
    key = (*rows.shape[1:], grad.shape[1], rows.dtype, gamma.dtype, negative_slope)
    specialized(_block_backward, *key)(
        rows, grad, *stats, gamma, beta, grad_gamma, grad_beta, negative_slope, overlapping
    )
    return overwrite(z, rows)


def _grad_sums(
    rows: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
    beta: Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    xh, _, d = parts(rows, ChannelStats(mean, inv_std), gamma, beta, negative_slope)
    grad_v = d * grad_output.to(d.dtype)
    return (grad_v * xh).sum(1).sum(0), grad_v.sum(1).sum(0)


def _grad_z(
    rows: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
    beta: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    negative_slope: float,
) -> None:
    xh, _, d = parts(rows, ChannelStats(mean, inv_std), gamma, beta, negative_slope)
    num_values = rows.shape[0] * rows.shape[1]
    mean_grad = grad_beta / num_values + xh * (grad_gamma / num_values)
    rows.copy_(gamma * inv_std * (d * grad_output.to(d.dtype) - mean_grad))


@torch.no_grad()
def norm_backward(
    z: Tensor,
    grad_output: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
) -> NormGradient:
    n, channels = z.shape[:2]
    whole = rows_of(z).contiguous()
    rows = whole.view(n, -1, channels)
    grad = rows_of(grad_output).reshape(n, -1, channels)
    left = open_rows(rows, grad)
    key = (*left, rows.dtype, grad.dtype, gamma.dtype, negative_slope)
    grad_gamma, grad_beta = specialized(_grad_sums, *key)(
        rows, grad, *stats, gamma, beta, negative_slope
    )
    specialized(_grad_z, *key)(
        rows, grad, *stats, gamma, beta, grad_gamma, grad_beta, negative_slope
    )
    return NormGradient(overwrite(z, whole), grad_gamma, grad_beta)
