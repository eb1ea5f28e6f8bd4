"""Periodic bases from their frequencies; see `kernels.interface.PeriodicBasis`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from locallearn.kernels.interface import PeriodicBasis

# In turns: a sample nearer than this to a zero crossing is zero.
ZERO_CROSSING = 1e-9 / (2 * math.pi)


def periodic_basis(basis: PeriodicBasis) -> Tensor:
    """D, (K, T), float64.

    The phase is taken modulo one turn before the sine: 512 radians a step times 2047 steps would
    leave float32 an error of 0.06 radians.
    """
    t = torch.arange(basis.latent_length, dtype=torch.float64, device=basis.turns.device)
    phase = (basis.first_phase[:, None] + basis.turns[:, None] * t).frac()
    phase = torch.where(phase < 0, phase + 1, phase)
    wave = torch.sin(2 * math.pi * phase)
    wave = torch.where(wave.abs() < 1e-9, 0.0, wave)
    return wave.sign() if basis.is_square else wave
