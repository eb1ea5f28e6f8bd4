"""Fixed bases B (rows, T): one wave, or one random vector, for each class.

Shapes: K rows (classes), T latent length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.errors import unknown_name

BASES = ("cosine", "square", "random")
SETTINGS = ("official", "paper")

# The authors' published code: f = linspace(50, 512, K) radians per step, whatever T is.
_OFFICIAL_FREQUENCIES = (50.0, 512.0)
_RANDOM_SCALE = 0.1


def check_basis(basis: str, setting: str) -> None:
    """Raises UserError, with the valid names, where either name is unknown."""
    if basis not in BASES:
        raise unknown_name("basis", basis, BASES)
    if setting not in SETTINGS:
        raise unknown_name("setting", setting, SETTINGS)


def build_basis(
    basis: str,
    setting: str,
    num_rows: int,
    latent_length: int,
    *,
    basis_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """B_c = g(f_c t), or a random matrix.

    Arguments:
        basis: "cosine" (g a wave), "square" (its sign) or "random".
        setting: "official", what the authors' published code does and so what their results come
            from: t = 0..T-1, g = sin, f = linspace(50, 512, K) radians per step; or "paper", what
            the text says: t = 1..T, g = cos, f equally spread from one period over the latent
            (2 pi / T) to the fastest wave that T samples can carry (pi). A random basis is
            0.1 * N(0, 1), drawn from torch's global generator, in both.
        num_rows: K (or R for a reduced basis).
        latent_length: T.
        basis_length: a random basis is drawn at this length and adaptive-average-pooled to T, as
            the authors do; T where None. Periodic bases ignore it.
        dtype: of the result. Waves are computed in float64 first: 512 radians a step times 2047
            steps leaves float32 an error of 0.06 radians.

    Returns:
        (num_rows, latent_length).

    Source: LLS (arXiv 2405.15868); for "official", the code published with it.
    """
    check_basis(basis, setting)
    if basis == "random":
        matrix = _RANDOM_SCALE * torch.randn(num_rows, basis_length or latent_length, dtype=dtype)
        return F.adaptive_avg_pool1d(matrix, latent_length)
    if setting == "official":
        t = torch.arange(latent_length, dtype=torch.float64)
        f = torch.linspace(*_OFFICIAL_FREQUENCIES, num_rows, dtype=torch.float64)
        wave = torch.sin(f[:, None] * t)
    else:
        t = torch.arange(1, latent_length + 1, dtype=torch.float64)
        periods = torch.linspace(1, latent_length / 2, num_rows, dtype=torch.float64)
        wave = torch.cos(2 * math.pi / latent_length * periods[:, None] * t)
    if basis == "square":
        wave = wave.sign()
    return wave.to(dtype)
