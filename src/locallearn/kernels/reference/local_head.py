"""`local_head`; see `kernels.interface`.

Shapes: N batch, C channels, T latent length, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.kernels.interface import HeadResult, Moments, PeriodicBasis
from locallearn.kernels.latents import pool_latents, unpool_latents
from locallearn.kernels.periodic_basis import periodic_basis
from locallearn.kernels.reference.channel_stats import per_channel

# Below this norm a latent is treated as zero (F.normalize's own epsilon).
_NORM_EPS = 1e-12


class Projected(NamedTuple):
    """loss: scalar; logits: (N, K); grad_latents: (N, T); grad_projection: (K, T) or None."""

    loss: Tensor
    logits: Tensor
    grad_latents: Tensor
    grad_projection: Tensor | None


@torch.no_grad()
def project_latents(
    latents: Tensor,
    projection: Tensor,
    labels: Tensor,
    *,
    normalize: bool,
    temperature: float,
    label_smoothing: float = 0.0,
    needs_grad_projection: bool = False,
) -> Projected:
    """The part of the head behind the latent p, (N, T); arguments as in `Kernels.local_head`.

    Also the whole head of a block whose latents were pooled from its output.
    """
    p = latents.to(projection.dtype)
    n = p.shape[0]
    num_classes = projection.shape[0]
    if normalize:
        norm = p.norm(dim=1, keepdim=True)
        inverse_norm = torch.where(norm > _NORM_EPS, 1 / norm, 0.0)
        q = p * inverse_norm
    else:
        q = p
    logits = (q @ projection.T) / temperature
    log_probabilities = logits.log_softmax(dim=1)
    loss = F.nll_loss(log_probabilities, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()

    classes = torch.arange(num_classes, device=labels.device)
    target = (labels[:, None] == classes).to(p.dtype) * (1 - label_smoothing)
    error = (log_probabilities.exp() - target - label_smoothing / num_classes) / (n * temperature)

    grad_latents = error @ projection
    if normalize:
        radial = (q * grad_latents).sum(dim=1, keepdim=True)
        grad_latents = (grad_latents - q * radial) * inverse_norm
    grad_projection = error.T @ q if needs_grad_projection else None
    return Projected(loss, logits, grad_latents, grad_projection)


def moment_latents(moments: Moments, gamma: Tensor, beta: Tensor) -> Tensor:
    """gamma s1 + beta s0, shaped like the moments."""
    s0, s1 = moments
    return per_channel(gamma, s1) * s1 + per_channel(beta, s0) * s0


def moment_gradients(moments: Moments, grad_latents: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dgamma and dL/dbeta, (C,), from G, shaped like the moments."""
    axes = [0, *range(2, grad_latents.ndim)]
    return (grad_latents * moments.s1).sum(axes), (grad_latents * moments.s0).sum(axes)


@torch.no_grad()
def local_head(
    moments: Moments,
    gamma: Tensor,
    beta: Tensor,
    projection: Tensor | PeriodicBasis,
    labels: Tensor,
    *,
    normalize: bool,
    temperature: float,
    label_smoothing: float = 0.0,
    needs_grad_projection: bool = False,
) -> HeadResult:
    if isinstance(projection, PeriodicBasis):
        projection = periodic_basis(projection).to(moments.s0.dtype)
    unpooled = moment_latents(moments, gamma, beta)
    length = projection.shape[1]
    is_linear = unpooled.ndim == 2
    latents = pool_latents(unpooled, length) if is_linear else unpooled.flatten(1)
    projected = project_latents(
        latents,
        projection,
        labels,
        normalize=normalize,
        temperature=temperature,
        label_smoothing=label_smoothing,
        needs_grad_projection=needs_grad_projection,
    )
    grad = projected.grad_latents
    grad = unpool_latents(grad, unpooled, length) if is_linear else grad.view(unpooled.shape)
    grad_gamma, grad_beta = moment_gradients(moments, grad)
    num_correct = (projected.logits.argmax(dim=1) == labels).sum()
    return HeadResult(
        projected.loss,
        num_correct,
        projected.logits,
        grad,
        grad_gamma,
        grad_beta,
        projected.grad_projection,
    )
