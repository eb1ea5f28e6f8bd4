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
# A centred row shorter than so many roundings of the row itself is taken for one without variation.
_ROUNDING = 16


class Projected(NamedTuple):
    """loss: scalar; logits: (N, K); grad_latents: (N, T); grad_projection: (K, T) or None."""

    loss: Tensor
    logits: Tensor
    grad_latents: Tensor
    grad_projection: Tensor | None


class Matched(NamedTuple):
    """loss: mean((S - Y)^2), scalar; grad_latents: (N, T)."""

    loss: Tensor
    grad_latents: Tensor


@torch.no_grad()
def match_similarity(latents: Tensor, labels: Tensor, num_classes: int) -> Matched:
    """How far the similarities of the latents are from those of the labels, and its gradient.

        c = p - mean of p over the batch      q = c / ||c||_2      S = q q^T
        dL/dq = 4 / N^2 (S - Y) q             Y: the same of the one-hot labels

    Arguments:
        latents: p, (N, T). One that is the batch's mean, but for rounding, has no direction, and no
            learning signal.
        labels: (N,), int64 in 0..K-1.
        num_classes: K.
    """
    n = len(latents)
    centred = latents - latents.mean(dim=0)
    # What rounding leaves of a latent that is the mean is no direction.
    noise = _ROUNDING * torch.finfo(latents.dtype).eps * latents.norm(dim=1, keepdim=True)
    q, inverse_norm = _directions(centred, noise)
    classes = torch.arange(num_classes, device=labels.device)
    onehot = (labels[:, None] == classes).to(latents.dtype)
    y, _ = _directions(onehot - onehot.mean(dim=0), _ROUNDING * torch.finfo(latents.dtype).eps)
    difference = q @ q.T - y @ y.T
    grad = _through_directions(difference @ q * (4 / n**2), q, inverse_norm)
    return Matched(difference.square().mean(), grad - grad.mean(dim=0))


def label_similarity(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Y, (N, N): cosine similarity of one-hot labels from which their mean over K is subtracted.

    1 within a class, -1 / (K - 1) between two. A single class leaves nothing to compare: 0.
    """
    is_same = (labels[:, None] == labels).to(dtype)
    if num_classes == 1:
        return torch.zeros_like(is_same)
    return (is_same * num_classes - 1) / (num_classes - 1)


def _directions(rows: Tensor, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Each row at length one, and the inverse of its length (N, 1); zero where that is zero, or
    no more than ``floor``."""
    norm = rows.norm(dim=1, keepdim=True)
    inverse_norm = torch.where((norm > _NORM_EPS) & (norm > floor), 1 / norm, 0.0)
    return rows * inverse_norm, inverse_norm


def _through_directions(grad_q: Tensor, q: Tensor, inverse_norm: Tensor) -> Tensor:
    """The gradient of the rows, from that of their directions."""
    radial = (q * grad_q).sum(dim=1, keepdim=True)
    return (grad_q - q * radial) * inverse_norm


@torch.no_grad()
def project_latents(
    latents: Tensor,
    projection: Tensor,
    labels: Tensor,
    *,
    normalize: bool,
    temperature: float,
    label_smoothing: float = 0.0,
    similarity: float = 0.0,
    needs_grad_projection: bool = False,
) -> Projected:
    """The part of the head behind the latent p, (N, T); arguments as in `Kernels.local_head`.

    Also the whole head of a block whose latents were pooled from its output.
    """
    p = latents.to(projection.dtype)
    n = p.shape[0]
    num_classes = projection.shape[0]
    q, inverse_norm = _directions(p) if normalize else (p, None)
    logits = (q @ projection.T) / temperature
    log_probabilities = logits.log_softmax(dim=1)
    loss = F.nll_loss(log_probabilities, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()

    classes = torch.arange(num_classes, device=labels.device)
    target = (labels[:, None] == classes).to(p.dtype) * (1 - label_smoothing)
    error = (log_probabilities.exp() - target - label_smoothing / num_classes) / (n * temperature)

    grad_latents = error @ projection
    if inverse_norm is not None:
        grad_latents = _through_directions(grad_latents, q, inverse_norm)
    if similarity:
        matched = match_similarity(p, labels, num_classes)
        loss = loss + similarity * matched.loss
        grad_latents = grad_latents + similarity * matched.grad_latents
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
    similarity: float = 0.0,
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
        similarity=similarity,
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
