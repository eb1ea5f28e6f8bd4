"""`local_head`; see `kernels.interface`.

With few classes one program takes one sample from the moments to G, and makes the latent twice
rather than keep it: <q, dL/dq> is <e, q D^T>, so that the logits are all it has to remember. With
many, both products with D are matrix products and the library's. So are the products of the
similarity term, which sees the whole batch at once.

Shapes: N batch, C channels, T latent length, K classes, F features of a linear block.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import ceil_div, check_dtypes, power_of_two, product
from locallearn.kernels.interface import HeadResult, Moments, PeriodicBasis
from locallearn.kernels.reference.local_head import match_similarity, moment_latents
from locallearn.kernels.triton.basis import basis_tile, load_phases
from locallearn.kernels.triton.common import OPTIONS, cell_range, row_offsets, view

# Below this norm a latent is treated as zero (F.normalize's own epsilon).
_NORM_EPS = tl.constexpr(1e-12)
# Up to here a sample's logits stay in one program.
MAX_FEW_CLASSES = 64
_TILE_ELEMENTS = 2048
_SUM_CHANNELS = 8
_SUM_ROWS = 256
_SUM_SAMPLES = 1024


class _Projected(NamedTuple):
    """losses, is_correct: (N,); logits: (N, K); grad: G; error: e, (N, K), and q, (N, T), or None.

    G is shaped like the moments, or (N, T) where the latents were pooled first.
    """

    losses: Tensor
    is_correct: Tensor
    logits: Tensor
    grad: Tensor
    error: Tensor | None
    q: Tensor | None


class _Latents(NamedTuple):
    """What p is made of: the moments, or (s0 None) p itself in s1's place."""

    s0: Tensor | None
    s1: Tensor
    gamma: Tensor
    beta: Tensor


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
    check_dtypes("triton", *moments)
    if moments.s0.stride() != moments.s1.stride():
        moments = Moments(*(t.contiguous() for t in moments))
    gamma, beta, labels = gamma.contiguous(), beta.contiguous(), labels.contiguous()
    num_classes, length = _sizes(projection)
    is_pooled = moments.s0.ndim == 2 and moments.s0.shape[1] != length
    latents = _Latents(*moments, gamma, beta)
    if is_pooled:
        latents = _Latents(None, _pool(latents, length), gamma, beta)

    project = _project_to_few if num_classes <= MAX_FEW_CLASSES else _project_to_many
    losses, is_correct, logits, grad, error, q = project(
        latents,
        projection,
        labels,
        normalize,
        float(temperature),
        float(label_smoothing),
        needs_grad_projection,
    )
    matched = None
    if similarity:
        p = latents.s1 if is_pooled else moment_latents(moments, gamma, beta).flatten(1)
        matched = match_similarity(p.float(), labels, num_classes)
        grad = grad + similarity * matched.grad_latents.view(grad.shape)
    if is_pooled:
        grad = _unpool(grad, moments.s0)
    loss, num_correct, grad_gamma, grad_beta = _sum_up(moments, grad, losses, is_correct)
    if matched is not None:
        loss = loss + similarity * matched.loss
    grad_projection = None if error is None or q is None else product(error.T, q)
    return HeadResult(loss, num_correct, logits, grad, grad_gamma, grad_beta, grad_projection)


def _sizes(projection: Tensor | PeriodicBasis) -> tuple[int, int]:
    """K and T."""
    if isinstance(projection, PeriodicBasis):
        return len(projection.turns), projection.latent_length
    return projection.shape[0], projection.shape[1]


def block_sizes(num_classes: int, latent_length: int) -> tuple[int, int]:
    """Classes and latent positions in the tile of a program with all of a sample's logits."""
    block_k = power_of_two(num_classes)
    return block_k, min(power_of_two(latent_length), _TILE_ELEMENTS // block_k)


def _project_to_few(
    latents: _Latents,
    projection: Tensor | PeriodicBasis,
    labels: Tensor,
    normalize: bool,
    temperature: float,
    label_smoothing: float,
    keeps_q: bool,
) -> _Projected:
    s1 = latents.s1
    of_s, n = view(s1), len(s1)
    matrix, turns, first_phase, is_square = None, None, None, False
    if isinstance(projection, PeriodicBasis):
        turns, first_phase = projection.turns.contiguous(), projection.first_phase.contiguous()
        is_square = projection.is_square
    else:
        matrix = projection
    num_classes, length = _sizes(projection)

    result = _empty_result(s1, num_classes)
    error, q = None, None
    if keeps_q:
        error, q = torch.empty_like(result.logits), _empty(s1, n, length)
    block_k, block_t = block_sizes(num_classes, length)
    _few_classes_kernel[(n,)](
        *latents,
        matrix,
        turns,
        first_phase,
        labels,
        result.logits,
        result.losses,
        result.is_correct,
        result.grad,
        error,
        q,
        temperature,
        label_smoothing,
        n,
        length,
        *of_s.strides,
        *view(result.grad).strides,
        *(matrix.stride() if matrix is not None else (0, 0)),
        CELLS=of_s.height,
        NUM_CLASSES=num_classes,
        NORMALIZE=normalize,
        IS_SQUARE=is_square,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        num_warps=8 if block_k * block_t >= _TILE_ELEMENTS else 4,
        **OPTIONS,
    )
    return result._replace(error=error, q=q)


def _project_to_many(
    latents: _Latents,
    projection: Tensor | PeriodicBasis,
    labels: Tensor,
    normalize: bool,
    temperature: float,
    label_smoothing: float,
    keeps_q: bool,
) -> _Projected:
    s1 = latents.s1
    of_s, n = view(s1), len(s1)
    if isinstance(projection, PeriodicBasis):
        matrix = _periodic_basis(projection)
    else:
        matrix = projection.to(torch.float32)
    num_classes, length = _sizes(matrix)

    result = _empty_result(s1, num_classes)
    q, inverse_norm = _empty(s1, n, length), _empty(s1, n)
    block_t = min(power_of_two(length), _TILE_ELEMENTS)
    _directions_kernel[(n,)](
        *latents,
        q,
        inverse_norm,
        length,
        *of_s.strides,
        CELLS=of_s.height,
        NORMALIZE=normalize,
        BLOCK_T=block_t,
        **OPTIONS,
    )
    products = product(q, matrix.T)
    error, radial = torch.empty_like(products), _empty(s1, n)
    _error_kernel[(n,)](
        products,
        labels,
        result.logits,
        result.losses,
        result.is_correct,
        error,
        radial,
        temperature,
        label_smoothing,
        n,
        NUM_CLASSES=num_classes,
        BLOCK_K=power_of_two(num_classes),
        **OPTIONS,
    )
    _grad_latents_kernel[(n,)](
        product(error, matrix),
        q,
        inverse_norm,
        radial,
        result.grad,
        length,
        *view(result.grad).strides,
        CELLS=of_s.height,
        NORMALIZE=normalize,
        BLOCK_T=block_t,
        **OPTIONS,
    )
    return result._replace(error=error, q=q) if keeps_q else result


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_result(s1: Tensor, num_classes: int) -> _Projected:
    n = len(s1)
    return _Projected(
        losses=_empty(s1, n),
        is_correct=_empty(s1, n, dtype=torch.int32),
        logits=_empty(s1, n, num_classes),
        grad=torch.empty_like(s1, dtype=torch.float32),
        error=None,
        q=None,
    )


def _pool(latents: _Latents, length: int) -> Tensor:
    """p of a linear block, pooled along its features: (N, F) to (N, T)."""
    n, num_features = latents.s1.shape
    pooled = _empty(latents.s1, n, length)
    block_t = min(power_of_two(length), _TILE_ELEMENTS)
    _pool_kernel[(n, ceil_div(length, block_t))](
        *latents,
        pooled,
        *latents.s1.stride(),
        FEATURES=num_features,
        LENGTH=length,
        BLOCK_T=block_t,
        **OPTIONS,
    )
    return pooled


def _unpool(grad: Tensor, s0: Tensor) -> Tensor:
    """The adjoint of the pooling: (N, T) to (N, F)."""
    n, num_features = s0.shape
    unpooled = _empty(s0, n, num_features)
    block_f = min(power_of_two(num_features), _TILE_ELEMENTS)
    _unpool_kernel[(n, ceil_div(num_features, block_f))](
        grad,
        unpooled,
        FEATURES=num_features,
        LENGTH=grad.shape[1],
        BLOCK_F=block_f,
        **OPTIONS,
    )
    return unpooled


def _periodic_basis(basis: PeriodicBasis) -> Tensor:
    """D, (K, T)."""
    num_classes, length = len(basis.turns), basis.latent_length
    matrix = _empty(basis.turns, num_classes, length)
    block_t = min(power_of_two(length), 256)
    block_k = min(power_of_two(num_classes), _TILE_ELEMENTS // block_t)
    grid = (ceil_div(num_classes, block_k), ceil_div(length, block_t))
    _periodic_basis_kernel[grid](
        basis.turns.contiguous(),
        basis.first_phase.contiguous(),
        matrix,
        num_classes,
        length,
        IS_SQUARE=basis.is_square,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        **OPTIONS,
    )
    return matrix


def _sum_up(
    moments: Moments, grad: Tensor, losses: Tensor, is_correct: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number that is correct, dL/dgamma and dL/dbeta."""
    of_s = view(moments.s0)
    loss, num_correct = _empty(losses), _empty(losses, dtype=torch.int64)
    grad_gamma, grad_beta = (_empty(losses, of_s.num_channels) for _ in range(2))
    _sum_up_kernel[(ceil_div(of_s.num_channels, _SUM_CHANNELS),)](
        *moments,
        grad,
        losses,
        is_correct,
        loss,
        num_correct,
        grad_gamma,
        grad_beta,
        of_s.num_images,
        of_s.num_channels,
        *of_s.strides,
        *view(grad).strides,
        CELLS=of_s.height,
        BLOCK_N=min(power_of_two(of_s.num_images), _SUM_SAMPLES),
        BLOCK_R=min(power_of_two(of_s.num_rows), _SUM_ROWS),
        BLOCK_C=_SUM_CHANNELS,
        **OPTIONS,
    )
    return loss, num_correct, grad_gamma, grad_beta


@triton.jit
def _place(t, stride_c, stride_h, stride_w, CELLS: tl.constexpr):
    """Where position t of a flattened latent lies in an image's (C, CELLS, CELLS), and its c."""
    c = t // (CELLS * CELLS)
    y = t // CELLS % CELLS
    x = t % CELLS
    return c * stride_c + y * stride_h + x * stride_w, c


@triton.jit
def _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, c, mask):
    """p = gamma s1 + beta s0, or what was pooled already."""
    p = tl.load(s1_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if s0_ptr is not None:
        s0 = tl.load(s0_ptr + place, mask=mask, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + c, mask=mask, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=mask, other=0.0).to(tl.float32)
        p = gamma * p + beta * s0
    return p


@triton.jit
def _inverse_norm(sum_of_squares):
    norm = tl.sqrt(sum_of_squares)
    is_zero = norm <= _NORM_EPS
    return tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, norm))


@triton.jit
def _softmax_error(
    logits,
    k,
    label,
    temperature,
    label_smoothing,
    batch_size,
    NUM_CLASSES: tl.constexpr,
):
    """Loss, whether the highest logit (the first of equals) is the label's, and e; of one sample.

    Logits of classes beyond the last are minus infinity.
    """
    is_class = k < NUM_CLASSES
    highest = tl.max(logits, axis=0)
    log_sum = tl.log(tl.sum(tl.exp(logits - highest), axis=0))
    log_probability = tl.where(is_class, logits - highest - log_sum, 0.0)
    target = tl.where(k == label, 1.0 - label_smoothing, 0.0) + label_smoothing / NUM_CLASSES
    loss = -tl.sum(tl.where(is_class, target * log_probability, 0.0), axis=0)
    predicted = tl.min(tl.where(logits == highest, k, NUM_CLASSES), axis=0)
    error = (tl.exp(log_probability) - target) / (batch_size * temperature)
    return loss, (predicted == label).to(tl.int32), tl.where(is_class, error, 0.0)


@triton.jit
def _few_classes_kernel(
    s0_ptr,
    s1_ptr,
    gamma_ptr,
    beta_ptr,
    projection_ptr,  # None: a periodic basis
    turns_ptr,
    first_phase_ptr,
    labels_ptr,
    logits_ptr,
    losses_ptr,
    correct_ptr,
    grad_ptr,
    error_ptr,  # None: neither e nor q is kept
    q_ptr,
    temperature,
    label_smoothing,
    batch_size,
    latent_length,
    s_stride_n,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    d_stride_k,
    d_stride_t,
    CELLS: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_SQUARE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    is_class = k < NUM_CLASSES
    if projection_ptr is None:
        increment = load_phases(turns_ptr, k, is_class)
        first_phase = load_phases(first_phase_ptr, k, is_class)

    products = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, latent_length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        is_latent = t < latent_length
        place, c = _place(t, s_stride_c, s_stride_h, s_stride_w, CELLS)
        place += row * s_stride_n
        p = _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, c, is_latent)
        if projection_ptr is None:
            d = basis_tile(first_phase, increment, t, IS_SQUARE)
        else:
            d_place = projection_ptr + k[:, None] * d_stride_k + t[None, :] * d_stride_t
            mask = is_class[:, None] & is_latent[None, :]
            d = tl.load(d_place, mask=mask, other=0.0).to(tl.float32)
        products += d * p[None, :]
        squares += p * p

    cosines = tl.sum(products, axis=1)
    inverse_norm = 1.0
    if NORMALIZE:
        inverse_norm = _inverse_norm(tl.sum(squares, axis=0))
        cosines *= inverse_norm
    logits = cosines / temperature
    tl.store(logits_ptr + row * NUM_CLASSES + k, logits, mask=is_class)
    logits = tl.where(is_class, logits, float("-inf"))
    label = tl.load(labels_ptr + row)
    loss, is_correct, error = _softmax_error(
        logits, k, label, temperature, label_smoothing, batch_size, NUM_CLASSES
    )
    tl.store(losses_ptr + row, loss)
    tl.store(correct_ptr + row, is_correct)
    if error_ptr is not None:
        tl.store(error_ptr + row * NUM_CLASSES + k, error, mask=is_class)
    radial = tl.sum(tl.where(is_class, error * cosines, 0.0), axis=0)

    for first in range(0, latent_length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        is_latent = t < latent_length
        if projection_ptr is None:
            d = basis_tile(first_phase, increment, t, IS_SQUARE)
        else:
            d_place = projection_ptr + k[:, None] * d_stride_k + t[None, :] * d_stride_t
            mask = is_class[:, None] & is_latent[None, :]
            d = tl.load(d_place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.sum(error[:, None] * d, axis=0)
        if NORMALIZE or q_ptr is not None:
            place, c = _place(t, s_stride_c, s_stride_h, s_stride_w, CELLS)
            place += row * s_stride_n
            p = _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, c, is_latent)
            q = p * inverse_norm
            if NORMALIZE:
                grad = (grad - q * radial) * inverse_norm
            if q_ptr is not None:
                tl.store(q_ptr + row * latent_length + t, q, mask=is_latent)
        g_place, c = _place(t, g_stride_c, g_stride_h, g_stride_w, CELLS)
        tl.store(grad_ptr + row * g_stride_n + g_place, grad, mask=is_latent)


@triton.jit
def _directions_kernel(
    s0_ptr,
    s1_ptr,
    gamma_ptr,
    beta_ptr,
    q_ptr,
    inverse_norm_ptr,
    latent_length,
    s_stride_n,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    CELLS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_norm = 1.0
    if NORMALIZE:
        squares = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, latent_length, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            place, c = _place(t, s_stride_c, s_stride_h, s_stride_w, CELLS)
            place += row * s_stride_n
            p = _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, c, t < latent_length)
            squares += p * p
        inverse_norm = _inverse_norm(tl.sum(squares, axis=0))
        tl.store(inverse_norm_ptr + row, inverse_norm)
    for first in range(0, latent_length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        place, c = _place(t, s_stride_c, s_stride_h, s_stride_w, CELLS)
        place += row * s_stride_n
        p = _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, c, t < latent_length)
        tl.store(q_ptr + row * latent_length + t, p * inverse_norm, mask=t < latent_length)


@triton.jit
def _error_kernel(
    products_ptr,
    labels_ptr,
    logits_ptr,
    losses_ptr,
    correct_ptr,
    error_ptr,
    radial_ptr,
    temperature,
    label_smoothing,
    batch_size,
    NUM_CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    is_class = k < NUM_CLASSES
    products = tl.load(products_ptr + row * NUM_CLASSES + k, mask=is_class, other=0.0)
    logits = products / temperature
    tl.store(logits_ptr + row * NUM_CLASSES + k, logits, mask=is_class)
    logits = tl.where(is_class, logits, float("-inf"))
    label = tl.load(labels_ptr + row)
    loss, is_correct, error = _softmax_error(
        logits, k, label, temperature, label_smoothing, batch_size, NUM_CLASSES
    )
    tl.store(losses_ptr + row, loss)
    tl.store(correct_ptr + row, is_correct)
    tl.store(error_ptr + row * NUM_CLASSES + k, error, mask=is_class)
    tl.store(radial_ptr + row, tl.sum(error * products, axis=0))


@triton.jit
def _grad_latents_kernel(
    grad_q_ptr,
    q_ptr,
    inverse_norm_ptr,
    radial_ptr,
    grad_ptr,
    latent_length,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    CELLS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, latent_length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = t < latent_length
        grad = tl.load(grad_q_ptr + row * latent_length + t, mask=mask, other=0.0)
        if NORMALIZE:
            q = tl.load(q_ptr + row * latent_length + t, mask=mask, other=0.0)
            grad -= q * tl.load(radial_ptr + row)
            grad *= tl.load(inverse_norm_ptr + row)
        place, _c = _place(t, g_stride_c, g_stride_h, g_stride_w, CELLS)
        tl.store(grad_ptr + row * g_stride_n + place, grad, mask=mask)


@triton.jit
def _periodic_basis_kernel(
    turns_ptr,
    first_phase_ptr,
    matrix_ptr,
    num_classes,
    latent_length,
    IS_SQUARE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_class = k < num_classes
    increment = load_phases(turns_ptr, k, is_class)
    first_phase = load_phases(first_phase_ptr, k, is_class)
    d = basis_tile(first_phase, increment, t, IS_SQUARE)
    mask = is_class[:, None] & (t < latent_length)[None, :]
    tl.store(matrix_ptr + k[:, None] * latent_length + t[None, :], d, mask=mask)


@triton.jit
def _pool_kernel(
    s0_ptr,
    s1_ptr,
    gamma_ptr,
    beta_ptr,
    pooled_ptr,
    stride_n,
    stride_f,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    start, num_features = cell_range(t, FEATURES, LENGTH)
    total = tl.zeros((BLOCK_T,), tl.float32)
    # No cell is longer than this: FEATURES / LENGTH, both ends rounded outwards.
    for i in range((FEATURES + LENGTH - 1) // LENGTH + 1):
        f = start + i
        mask = (t < LENGTH) & (f < start + num_features)
        place = row * stride_n + f * stride_f
        total += _load_latents(s0_ptr, s1_ptr, gamma_ptr, beta_ptr, place, f, mask)
    tl.store(pooled_ptr + row * LENGTH + t, total / num_features, mask=t < LENGTH)


@triton.jit
def _unpool_kernel(
    grad_ptr,
    unpooled_ptr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_F,), tl.float32)
    # No feature is in more cells than this.
    for i in range((LENGTH + FEATURES - 1) // FEATURES + 1):
        t = f * LENGTH // FEATURES + i
        start, num_features = cell_range(t, FEATURES, LENGTH)
        mask = (f < FEATURES) & (t < LENGTH) & (start <= f)
        total += tl.load(grad_ptr + row * LENGTH + t, mask=mask, other=0.0) / num_features
    tl.store(unpooled_ptr + row * FEATURES + f, total, mask=f < FEATURES)


@triton.jit
def _sum_up_kernel(
    s0_ptr,
    s1_ptr,
    grad_ptr,
    losses_ptr,
    correct_ptr,
    loss_ptr,
    num_correct_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    batch_size,
    num_channels,
    s_stride_n,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    CELLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = (channel < num_channels)[None, :]
    sum_gamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_beta = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    num_rows = batch_size * (CELLS * CELLS)
    for first in range(0, num_rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < num_rows)[:, None] & is_channel
        s_row = row_offsets(row, s_stride_n, s_stride_h, s_stride_w, CELLS, CELLS)
        g_row = row_offsets(row, g_stride_n, g_stride_h, g_stride_w, CELLS, CELLS)
        s_place = s_row[:, None] + channel[None, :] * s_stride_c
        g_place = g_row[:, None] + channel[None, :] * g_stride_c
        grad = tl.load(grad_ptr + g_place, mask=mask, other=0.0)
        sum_gamma += grad * tl.load(s1_ptr + s_place, mask=mask, other=0.0).to(tl.float32)
        sum_beta += grad * tl.load(s0_ptr + s_place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_gamma_ptr + channel, tl.sum(sum_gamma, axis=0), mask=channel < num_channels)
    tl.store(grad_beta_ptr + channel, tl.sum(sum_beta, axis=0), mask=channel < num_channels)

    if tl.program_id(0) == 0:
        sum_loss = tl.zeros((BLOCK_N,), tl.float32)
        sum_correct = tl.zeros((BLOCK_N,), tl.int32)
        for first in range(0, batch_size, BLOCK_N):
            sample = first + tl.arange(0, BLOCK_N)
            sum_loss += tl.load(losses_ptr + sample, mask=sample < batch_size, other=0.0)
            sum_correct += tl.load(correct_ptr + sample, mask=sample < batch_size, other=0)
        tl.store(loss_ptr, tl.sum(sum_loss, axis=0) / batch_size)
        tl.store(num_correct_ptr, tl.sum(sum_correct, axis=0).to(tl.int64))
