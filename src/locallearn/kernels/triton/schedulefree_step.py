"""`schedulefree_step`; see `kernels.interface`.

One launch takes the step of all tensors. A table on the device says for every program where its
piece of y, g, z and v begins and how many elements are left from there; it is made anew only when
a tensor has moved, by launches that hand the addresses over as arguments, so that no memory of
the host takes part.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from locallearn.kernels.device_layout import Quadruple, ceil_div, quadruples_of
from locallearn.kernels.interface import ScheduleFreeState
from locallearn.kernels.triton.common import OPTIONS

BLOCK = 1024
_COLUMNS = tl.constexpr(5)  # addresses in y, g, z and v; elements left
_ROWS_OF_A_PROGRAM = 128
_MAX_TABLES = 64

_Key = tuple[torch.device, tuple[tuple[int, ...], ...]]


class _Tables:
    """Tables by the addresses and sizes that are in them, and so never out of date."""

    def __init__(self) -> None:
        self._recent: OrderedDict[_Key, Tensor] = OrderedDict()
        # A captured CUDA graph goes on reading the table that it was captured with.
        self._captured: dict[_Key, Tensor] = {}

    def get(self, quadruples: Sequence[Quadruple]) -> Tensor:
        places = tuple((*(t.data_ptr() for t in q), q[0].numel()) for q in quadruples)
        key = (quadruples[0][0].device, places)
        if key in self._captured:
            return self._captured[key]
        table = self._recent.pop(key, None)
        is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if is_capturing and table is None:
            # Filled whenever the graph runs, and by nothing else: of no use outside it.
            return _make_table(quadruples)
        if table is None:
            table = _make_table(quadruples)
        if is_capturing:
            self._captured[key] = table
            return table
        self._recent[key] = table
        if len(self._recent) > _MAX_TABLES:
            self._recent.popitem(last=False)
        return table


_TABLES = _Tables()


def _make_table(quadruples: Sequence[Quadruple]) -> Tensor:
    num_rows = [ceil_div(q[0].numel(), BLOCK) for q in quadruples]
    table = torch.empty(
        sum(num_rows), _COLUMNS.value, dtype=torch.int64, device=quadruples[0][0].device
    )
    first_row = 0
    for quadruple, rows in zip(quadruples, num_rows, strict=True):
        _fill_table_kernel[(ceil_div(rows, _ROWS_OF_A_PROGRAM),)](
            table,
            *quadruple,
            first_row,
            quadruple[0].numel(),
            BLOCK=BLOCK,
            ROWS=_ROWS_OF_A_PROGRAM,
            **OPTIONS,
        )
        first_row += rows
    return table


@torch.no_grad()
def schedulefree_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    z: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    state: ScheduleFreeState,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    averages_by_bias_correction: bool = False,
) -> None:
    quadruples = quadruples_of("triton", parameters, gradients, z, exp_avg_sq)
    scalars = torch.empty(4, dtype=torch.float32, device=state.step.device)
    beta1, beta2 = betas
    _advance_kernel[(1,)](
        *state,
        scalars,
        BETA1=float(beta1),
        LOG_BETA2=math.log(beta2) if beta2 else -math.inf,
        WARMUP_STEPS=warmup_steps,
        R=float(r),
        WEIGHT_LR_POWER=float(weight_lr_power),
        AVERAGES_BY_BIAS_CORRECTION=averages_by_bias_correction,
        num_warps=1,
        **OPTIONS,
    )
    if quadruples:
        table = _TABLES.get(quadruples)
        _schedulefree_kernel[(len(table),)](
            table,
            scalars,
            float(beta2),
            1 - float(beta2),
            float(eps),
            float(weight_decay),
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )


@triton.jit
def _advance_kernel(
    step_ptr,
    weight_sum_ptr,
    lr_ptr,
    lr_max_ptr,
    scalars_ptr,  # c, lr, rate of y, bias2
    BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    WARMUP_STEPS: tl.constexpr,
    R: tl.constexpr,
    WEIGHT_LR_POWER: tl.constexpr,
    AVERAGES_BY_BIAS_CORRECTION: tl.constexpr,
):
    """Count the step. A kernel's own, since each program of the other reads what this one writes.

    Constants enter as float64, which an argument that is no constant would not.
    """
    one = tl.full((), 1.0, tl.float64)
    k = tl.load(step_ptr) + one
    lr = tl.load(lr_ptr)
    if WARMUP_STEPS > 0:
        lr *= tl.minimum(k / tl.full((), WARMUP_STEPS, tl.float64), one)
    lr_max = tl.maximum(lr, tl.load(lr_max_ptr))
    bias2 = one - tl.exp(k * tl.full((), LOG_BETA2, tl.float64))
    if AVERAGES_BY_BIAS_CORRECTION:
        weight = lr * lr * bias2
    else:
        weight = _power(k, R) * _power(lr_max, WEIGHT_LR_POWER)
    weight_sum = tl.load(weight_sum_ptr) + weight
    # A rate of zero weighs nothing; the average then stays where it is.
    c = tl.where(weight_sum > 0, weight / tl.where(weight_sum > 0, weight_sum, one), 0.0)

    tl.store(step_ptr, k)
    tl.store(weight_sum_ptr, weight_sum)
    tl.store(lr_max_ptr, lr_max)
    tl.store(scalars_ptr, c.to(tl.float32))
    tl.store(scalars_ptr + 1, lr.to(tl.float32))
    y_rate = lr * (tl.full((), BETA1, tl.float64) * (one - c) - one)
    tl.store(scalars_ptr + 2, y_rate.to(tl.float32))
    tl.store(scalars_ptr + 3, bias2.to(tl.float32))


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for x >= 0, float64."""
    one = tl.full((), 1.0, tl.float64)
    if EXPONENT == 0:
        power = one
    elif EXPONENT == 1:
        power = x
    elif EXPONENT == 2:
        power = x * x
    else:
        is_positive = x > 0
        log = tl.log(tl.where(is_positive, x, one))
        power = tl.exp(log * tl.full((), EXPONENT, tl.float64))
        power = tl.where(is_positive, power, 0.0)
    return power


@triton.jit
def _fill_table_kernel(
    table_ptr,
    y_ptr,
    g_ptr,
    z_ptr,
    v_ptr,
    first_row,
    size,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = row.to(tl.int64) * BLOCK
    mask = first < size
    entry = table_ptr + (first_row + row) * _COLUMNS
    num_bytes = first * 4
    tl.store(entry, y_ptr.to(tl.int64) + num_bytes, mask=mask)
    tl.store(entry + 1, g_ptr.to(tl.int64) + num_bytes, mask=mask)
    tl.store(entry + 2, z_ptr.to(tl.int64) + num_bytes, mask=mask)
    tl.store(entry + 3, v_ptr.to(tl.int64) + num_bytes, mask=mask)
    tl.store(entry + 4, size - first, mask=mask)


@triton.jit
def _schedulefree_kernel(
    table_ptr,
    scalars_ptr,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    entry = table_ptr + tl.program_id(0) * _COLUMNS
    y_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    z_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    mask = i < tl.load(entry + 4)
    c = tl.load(scalars_ptr)
    lr = tl.load(scalars_ptr + 1)
    y_rate = tl.load(scalars_ptr + 2)
    bias2 = tl.load(scalars_ptr + 3)

    y = tl.load(y_ptr + i, mask=mask, other=0.0)
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    z = tl.load(z_ptr + i, mask=mask, other=0.0)
    v = tl.load(v_ptr + i, mask=mask, other=0.0)
    v = beta2 * v + one_minus_beta2 * g * g
    direction = g / (tl.sqrt(v / bias2) + eps) + weight_decay * y
    tl.store(v_ptr + i, v, mask=mask)
    tl.store(y_ptr + i, y + c * (z - y) + y_rate * direction, mask=mask)
    tl.store(z_ptr + i, z - lr * direction, mask=mask)
