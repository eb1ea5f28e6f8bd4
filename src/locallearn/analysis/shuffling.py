"""A score beside what it is where the classes are shuffled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Sums in another order differ by rounding; a permutation that changes nothing has to count.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Shuffled:
    """A permutation test, one-sided.

    value: the score; mean, std: over the permutations; p_value: (1 + how many of them reach the
    score) / (1 + how many there are).
    """

    value: float
    mean: float
    std: float
    p_value: float

    @classmethod
    def of(cls, value: float, shuffled: Array) -> Shuffled:
        """Of a score and those of the permutations, (P,)."""
        reached = int((shuffled >= value - _ROUNDING).sum())
        p_value = (1 + reached) / (1 + len(shuffled))
        return cls(value, float(shuffled.mean()), float(shuffled.std()), p_value)
