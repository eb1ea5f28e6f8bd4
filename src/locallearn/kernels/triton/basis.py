"""Periodic bases inside a kernel; see `kernels.interface.PeriodicBasis`.

Phases are 64-bit integers, 2^64 a turn, so that the turns which float32 could not hold fall away
by overflow, and no sine in double precision is needed.

Shapes: K classes, T latent length.
"""
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from locallearn.kernels.periodic_basis import ZERO_CROSSING

# In units of phase.
_NEARLY_ZERO = tl.constexpr(round(ZERO_CROSSING * 2**64))
_NEARLY_HALF = tl.constexpr(2**63 - round(ZERO_CROSSING * 2**64))


@triton.jit
def load_phases(ptr, k, is_class):
    """Turns as 64-bit phases, -2^63 to 2^63: their fraction is exact in float64."""
    turns = tl.load(ptr + k, mask=is_class, other=0.0)
    fraction = turns - tl.floor(turns)
    fraction = tl.where(fraction < 0.5, fraction, fraction - 1.0)
    return (fraction * 18446744073709551616.0).to(tl.int64)


@triton.jit
def basis_tile(first_phase, increment, t, IS_SQUARE: tl.constexpr):
    """D for phases (block of K,) and t (block of T,): (K, T), float32."""
    phase = first_phase[:, None] + increment[:, None] * t.to(tl.int64)[None, :]
    # Phases from 2^63 on have come round to negative ones; so sign(phase) is the sine's.
    from_zero = tl.where(phase < 0, -phase, phase)
    is_zero = (from_zero < _NEARLY_ZERO) | (from_zero > _NEARLY_HALF)
    # -2^63 is its own negative: half a turn.
    is_zero = is_zero | (from_zero < 0)
    sign = tl.where(is_zero, 0.0, tl.where(phase < 0, -1.0, 1.0))
    if IS_SQUARE:
        wave = sign
    else:
        # 31 bits of the angle from the nearest crossing, at most a quarter turn.
        top = (from_zero >> 32).to(tl.int32)
        top = tl.where(top > 1073741824, 2147483647 - top, top)
        wave = sign * _sine(top.to(tl.float32) * 1.462918079267159629e-9)
    return wave


@triton.jit
def _sine(x):
    """sin x for 0 <= x <= pi / 2: Taylor's polynomial of degree 13, off by 7e-10 at most.

    The library's sine would bring along its reduction of large arguments, and a stack for it.
    """
    y = x * x
    p = 1.605904383682161e-10 * y - 2.505210838544172e-08
    p = p * y + 2.755731922398589e-06
    p = p * y - 1.984126984126984e-04
    p = p * y + 8.333333333333333e-03
    p = p * y - 1.666666666666667e-01
    return x + x * y * p
