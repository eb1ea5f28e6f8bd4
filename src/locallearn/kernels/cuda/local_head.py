"""`local_head`; see `kernels.interface`.

Shapes: N batch, C channels, T latent length, K classes, F features of a linear block.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from locallearn.kernels.cuda.common import (
    FINISH_BLOCK,
    FINISH_CHANNELS,
    MAX_THREADS,
    WARP,
    Threads,
    channels_last,
    empty,
    per_channel,
    program_of,
    sizes,
    threads_for,
    vector_of,
)
from locallearn.kernels.cuda.compilation import Program
from locallearn.kernels.cuda.launching import address, launch
from locallearn.kernels.device_layout import ceil_div, check_dtypes, product
from locallearn.kernels.interface import HeadResult, Moments, PeriodicBasis
from locallearn.kernels.latents import pool_latents, unpool_latents
from locallearn.kernels.periodic_basis import ZERO_CROSSING
from locallearn.kernels.reference.local_head import (
    match_similarity,
    moment_gradients,
    moment_latents,
)

# Up to here one block takes a sample from the moments to G.
MAX_FEW_CLASSES = 64
# What D is to local_head.cu: kMatrix, kSine and kSquare.
_MATRIX, _SINE, _SQUARE = range(3)
# What that block may share beside its own declarations, of the 48 KiB that every device has.
_MAX_SHARED_BYTES = 32 * 2**10


class _Projection(ctypes.Structure):
    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("stride_k", ctypes.c_int),
        ("stride_t", ctypes.c_int),
        ("turns", ctypes.c_void_p),
        ("first_phase", ctypes.c_void_p),
    )


class _Latents(ctypes.Structure):
    _fields_ = (
        ("s0", ctypes.c_void_p),
        ("s1", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("num_channels", ctypes.c_int),
        ("num_cells", ctypes.c_int),
        ("length", ctypes.c_int),
    )


class _Loss(ctypes.Structure):
    _fields_ = (
        ("labels", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("is_correct", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("label_smoothing", ctypes.c_float),
        ("num_classes", ctypes.c_int),
    )


class _Call(NamedTuple):
    """What both ways of projecting take, and write: G, (N, 2, C) sums of it, losses, logits."""

    program: Program
    threads: Threads
    latents: _Latents
    loss: _Loss
    normalize: bool
    grad_latents: Tensor
    sums: Tensor


class _Kept(NamedTuple):
    """e, (N, K), and q, (N, T)."""

    error: Tensor
    q: Tensor


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
    check_dtypes("cuda", *moments)
    moments = Moments(*(channels_last(t.to(torch.float32)) for t in moments))
    gamma, beta = per_channel(gamma, beta)
    labels = labels.contiguous()
    if isinstance(projection, PeriodicBasis):
        num_classes, length = len(projection.turns), projection.latent_length
    else:
        num_classes, length = projection.shape
        projection = projection.to(torch.float32)
    n, c, *cells = sizes(moments.s0)
    num_cells = cells[0] * cells[1]

    grad = torch.empty_like(moments.s0)
    logits, losses = empty(grad, n, num_classes), empty(grad, n)
    is_correct = empty(grad, n, dtype=torch.int32)
    vector = vector_of(c, *moments, grad, gamma, beta)
    call = _Call(
        _program(vector, projection),
        threads_for(c, vector, 1).filled(),
        _Latents(*map(address, (*moments, gamma, beta)), c, num_cells, length),
        _Loss(
            *map(address, (labels, logits, losses, is_correct)),
            temperature,
            label_smoothing,
            num_classes,
        ),
        normalize,
        grad,
        empty(grad, n, 2, c),
    )
    num_shared_bytes = 4 * (length + length // WARP)
    if num_classes <= MAX_FEW_CLASSES and num_shared_bytes <= _MAX_SHARED_BYTES:
        kept = _project_to_few(call, projection, num_shared_bytes, needs_grad_projection)
    else:
        kept = _project_to_many(call, projection)

    loss, num_correct = empty(grad), empty(grad, dtype=torch.int64)
    grad_gamma, grad_beta = empty(grad, c), empty(grad, c)
    launch(
        call.program,
        "sum_up",
        (ceil_div(c, FINISH_CHANNELS),),
        FINISH_BLOCK,
        call.sums,
        losses,
        is_correct,
        loss,
        num_correct,
        grad_gamma,
        grad_beta,
        n,
        c,
    )
    grad_projection = None
    if needs_grad_projection:
        assert kept is not None
        grad_projection = product(kept.error.T, kept.q)
    result = HeadResult(loss, num_correct, logits, grad, grad_gamma, grad_beta, grad_projection)
    if similarity:
        return _with_similarity(result, moments, gamma, beta, labels, length, similarity)
    return result


def _program(vector: int, projection: Tensor | PeriodicBasis) -> Program:
    basis = _MATRIX
    if isinstance(projection, PeriodicBasis):
        basis = _SQUARE if projection.is_square else _SINE
    return program_of(
        "local_head.cu",
        torch.float32,
        vector,
        BASIS=basis,
        MAX_FEW_CLASSES=MAX_FEW_CLASSES,
        ZERO_CROSSING=f"{round(ZERO_CROSSING * 2**64)}ull",
    )


def _projection(projection: Tensor | PeriodicBasis) -> _Projection:
    """By addresses: what they belong to must outlive the launch's call."""
    if isinstance(projection, Tensor):
        return _Projection(address(projection), *projection.stride(), None, None)
    phases = projection.turns, projection.first_phase
    assert all(t.is_contiguous() for t in phases)
    return _Projection(None, 0, 0, *map(address, phases))


def _project_to_few(
    call: _Call, projection: Tensor | PeriodicBasis, num_shared_bytes: int, keeps: bool
) -> _Kept | None:
    n, kept = len(call.grad_latents), None
    if keeps:
        kept = _Kept(
            empty(call.sums, n, call.loss.num_classes), empty(call.sums, n, call.latents.length)
        )
    launch(
        call.program,
        "local_head",
        (n,),
        call.threads.block,
        call.latents,
        _projection(projection),
        call.loss,
        int(call.normalize),
        call.grad_latents,
        call.sums,
        *(kept or (None, None)),
        num_shared_bytes=num_shared_bytes,
    )
    return kept


def _project_to_many(call: _Call, projection: Tensor | PeriodicBasis) -> _Kept:
    n = len(call.grad_latents)
    matrix = periodic_basis(projection) if isinstance(projection, PeriodicBasis) else projection
    q, inverse_norms = empty(call.sums, n, call.latents.length), empty(call.sums, n)
    launch(
        call.program,
        "directions",
        (n,),
        call.threads.block,
        call.latents,
        int(call.normalize),
        q,
        inverse_norms,
    )
    products = product(q, matrix.T)
    error, radials = torch.empty_like(products), empty(q, n)
    launch(call.program, "errors", (n,), (WARP,), call.loss, products, error, radials)
    launch(
        call.program,
        "gradients",
        (n,),
        call.threads.block,
        call.latents,
        int(call.normalize),
        product(error, matrix),
        q,
        inverse_norms,
        radials,
        call.grad_latents,
        call.sums,
    )
    return _Kept(error, q)


def periodic_basis(basis: PeriodicBasis) -> Tensor:
    """D, (K, T)."""
    num_classes, length = len(basis.turns), basis.latent_length
    matrix = empty(basis.turns, num_classes, length)
    launch(
        _program(1, basis),
        "periodic_basis",
        (ceil_div(length, MAX_THREADS), num_classes),
        (MAX_THREADS,),
        _projection(basis),
        matrix,
        length,
    )
    return matrix


def _with_similarity(
    result: HeadResult,
    moments: Moments,
    gamma: Tensor,
    beta: Tensor,
    labels: Tensor,
    length: int,
    similarity: float,
) -> HeadResult:
    """The same with the similarity term, whose matrix products are the library's."""
    p = moment_latents(moments, gamma, beta)
    size = length if p.ndim == 2 else p.shape[-1]
    matched = match_similarity(pool_latents(p, size), labels, result.logits.shape[1])
    more = similarity * unpool_latents(matched.grad_latents, p, size)
    grad_gamma, grad_beta = moment_gradients(moments, more)
    return result._replace(
        loss=result.loss + similarity * matched.loss,
        grad_latents=result.grad_latents + more,
        grad_gamma=result.grad_gamma + grad_gamma,
        grad_beta=result.grad_beta + grad_beta,
    )
