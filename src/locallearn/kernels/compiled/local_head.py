"""`local_head`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.compiled.compilation import open_batch, specialized
from locallearn.kernels.interface import HeadResult, Moments, PeriodicBasis
from locallearn.kernels.periodic_basis import periodic_basis
from locallearn.kernels.reference import local_head as reference


def _local_head(
    s0: Tensor,
    s1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    projection: Tensor,
    labels: Tensor,
    normalize: bool,
    temperature: float,
    label_smoothing: float,
    similarity: float,
    needs_grad_projection: bool,
) -> HeadResult:
    return reference(
        Moments(s0, s1),
        gamma,
        beta,
        projection,
        labels,
        normalize=normalize,
        temperature=temperature,
        label_smoothing=label_smoothing,
        similarity=similarity,
        needs_grad_projection=needs_grad_projection,
    )


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
    s0, s1 = moments
    # Tensors of our own, to be marked.
    gamma, beta, projection, labels = (t.detach() for t in (gamma, beta, projection, labels))
    open_batch(s0, s1, labels)
    settings = (normalize, temperature, label_smoothing, similarity, needs_grad_projection)
    shape: tuple[int, ...] = (*s0.shape[1:], *projection.shape)
    if s0.ndim == 4 and len(gamma) > 1:
        # Whatever the channels are: a head takes a second or two to compile.
        for tensor, dimension in ((s0, 1), (s1, 1), (gamma, 0), (beta, 0), (projection, 1)):
            torch._dynamo.mark_dynamic(tensor, dimension)
        shape = (*s0.shape[2:], len(projection))
    key = (s0.ndim, *shape, s0.dtype, projection.dtype, *settings)
    return specialized(_local_head, *key)(s0, s1, gamma, beta, projection, labels, *settings)
