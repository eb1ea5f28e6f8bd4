"""The local head of the projection rules: loss, learning signal and basis gradient in closed form.

Shapes: N batch, T latent length, K classes.

    q      = p / ||p||_2  where normalize, else p                  (N, T)
    logits = q D^T / temperature                                   (N, K)
    loss   = cross_entropy(logits, y)                              mean over N
    e      = (softmax(logits) - target) / (N * temperature)        (N, K)
    dL/dq  = e D          dL/dD = e^T q
    dL/dp  = (dL/dq - q <q, dL/dq>) / ||p||  where normalize, else dL/dq

No autograd graph is built: the whole backward is two small products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this norm a latent is treated as zero (F.normalize's own epsilon).
_NORM_EPS = 1e-12


class LocalHeadResult(NamedTuple):
    """loss: scalar; logits: (N, K); grad_latents: (N, T); grad_projection: (K, T) or None."""

    loss: Tensor
    logits: Tensor
    grad_latents: Tensor
    grad_projection: Tensor | None


@torch.no_grad()
def local_head(
    latents: Tensor,
    projection: Tensor,
    labels: Tensor,
    *,
    normalize: bool,
    temperature: float,
    label_smoothing: float = 0.0,
    needs_grad_projection: bool = False,
) -> LocalHeadResult:
    """Cross-entropy of the projected latents, with its gradients.

    Arguments:
        latents: p, (N, T). 16-bit latents are computed in float32, as the projection is kept.
        projection: D, (K, T), float32 or float64.
        labels: y, (N,), int64 in 0..K-1.
        normalize: project the direction of the latent alone.
        temperature: divides the logits.
        label_smoothing: mass spread evenly over the classes, in [0, 1).
        needs_grad_projection: whether dL/dD is wanted (D has trained parameters behind it).

    Returns:
        LocalHeadResult in the projection's dtype. The learning signal of an all-zero latent,
        where the direction is undefined, is zero.

    Source: LLS (arXiv 2405.15868), for M equations 5 and 6; the gradients are worked out above.
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
    logits = (q @ projection.T).div_(temperature)
    log_probabilities = logits.log_softmax(dim=1)
    loss = F.nll_loss(log_probabilities, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()

    error = log_probabilities.exp_()
    if label_smoothing:
        error -= label_smoothing / num_classes
    on_target = error.new_full((n, 1), -(1.0 - label_smoothing))
    error.scatter_add_(1, labels[:, None], on_target)
    error /= n * temperature

    grad_latents = error @ projection
    if normalize:
        radial = (q * grad_latents).sum(dim=1, keepdim=True)
        grad_latents = grad_latents.addcmul_(q, radial, value=-1).mul_(inverse_norm)
    grad_projection = error.T @ q if needs_grad_projection else None
    return LocalHeadResult(loss, logits, grad_latents, grad_projection)
