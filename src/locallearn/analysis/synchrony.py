"""Whether a block's latents swing at their class's frequency (the paper's figure 2).

Shapes: K classes, T latent length, F = T // 2 + 1 frequency bins, P permutations.

A latent is read as a signal over its T places; bin k stands for k / T cycles per place. Of the
class means m_c what all classes share is removed, x_c = m_c - mean over classes: LeakyReLU makes
latents all but positive, so that most of their energy is one vector common to all classes, and no
logit that is compared with another depends on it.

    P_c[k] = |rfft(x_c)[k]|^2,  k = 1..T/2            the constant, k = 0, left out; the last bin
                                                      of an even T, which stands alone where
                                                      others stand for k and -k, halved
    own(c) = k*-1, k*, k*+1,  k* = argmax of the spectrum of row c of the reference
    E[i, j] = sum of P_i over own(j) / sum of P_i     the share of class i's energy at j's frequency
    index   = mean over c of E[c, c]

The reference is what the latent is compared with, D, its rows less their mean as well. Shuffled:
the index with the frequencies dealt out to the classes at random. The match is the cosine between
the amplitude spectra of x_c and of row c, so that harmonics and mixtures of waves count too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from locallearn.analysis.shuffling import Array, Shuffled
from locallearn.errors import UserError

NUM_PERMUTATIONS = 9999
_REACH = 1  # bins to each side of a peak
_MIN_LENGTH = 8


@dataclass(frozen=True)
class Synchrony:
    """Of one block.

    Arguments:
        latent_length: T.
        reference: (K, F), each row's power spectrum as shares of its sum, the constant zero.
        activation: (K, F), the same of the class means.
        peaks: (K,), int64, bin of each row's own frequency.
        energy: E, (K, K), in [0, 1].
        index, match: against shuffled classes.
        ceiling: the index that the reference's own rows would have.
        chance: the index of white noise: the bins of own(c) among all.
    """

    latent_length: int
    reference: Array
    activation: Array
    peaks: npt.NDArray[np.int64]
    energy: Array
    index: Shuffled
    match: Shuffled
    ceiling: float
    chance: float

    @property
    def num_peaks_at_own(self) -> int:
        """Classes whose mean latent's strongest bin is within reach of their own frequency."""
        apart = np.abs(self.activation.argmax(axis=1) - self.peaks)
        return int((apart <= _REACH).sum())

    @property
    def num_peaks_shuffled(self) -> float:
        """The same count with the classes shuffled: its mean over all permutations."""
        apart = np.abs(self.activation.argmax(axis=1)[:, None] - self.peaks)  # (K, K)
        return float((apart <= _REACH).sum() / len(self.peaks))

    @property
    def num_distinct_frequencies(self) -> int:
        """Bins that are some class's own frequency; fewer than K where classes have the same."""
        return len(np.unique(self.peaks))

    @property
    def num_overlapping(self) -> int:
        """Classes c whose bins own(c) are in part another class's too."""
        apart = np.abs(self.peaks[:, None] - self.peaks)
        return int(((apart <= 2 * _REACH).sum(axis=1) > 1).sum())

    def numbers(self) -> dict[str, Any]:
        """What there is to report, as plain values."""
        return {
            "index": asdict(self.index),
            "match": asdict(self.match),
            "num_peaks_at_own": self.num_peaks_at_own,
            "num_peaks_shuffled": self.num_peaks_shuffled,
            "num_distinct_frequencies": self.num_distinct_frequencies,
            "num_overlapping_classes": self.num_overlapping,
            "ceiling": self.ceiling,
            "chance": self.chance,
            "own_frequencies_cycles_per_place": self.frequencies[self.peaks].tolist(),
        }

    @property
    def frequencies(self) -> Array:
        """(F,), cycles per place of the latent."""
        return np.arange(self.reference.shape[1]) / self.latent_length


def synchrony(means: Tensor, reference: Tensor, *, seed: int = 0) -> Synchrony:
    """The numbers of figure 2, as the module says.

    Arguments:
        means: (K, T), mean latents by class.
        reference: D, (K, T).
        seed: of the permutations.

    Raises:
        UserError: fewer than two classes, latents too short to have a spectrum, or classes whose
            means are all alike.
    """
    assert means.shape == reference.shape
    num_classes, length = means.shape
    if num_classes < 2 or length < _MIN_LENGTH:
        raise UserError(
            f"a spectrum by class needs two classes and latents of {_MIN_LENGTH} values, got "
            f"{num_classes} and {length}. Choose another --block."
        )
    activation, rows = _shares(means), _shares(reference)
    peaks = rows.argmax(axis=1)
    energy = _energy_at(activation, peaks)
    amplitudes = [np.sqrt(shares) for shares in (activation, rows)]
    likeness = amplitudes[0] @ amplitudes[1].T  # shares sum to one, so this is a cosine
    order = _permutations(num_classes, seed)
    return Synchrony(
        latent_length=length,
        reference=rows,
        activation=activation,
        peaks=peaks,
        energy=energy,
        index=against_shuffled(energy, order),
        match=against_shuffled(likeness, order),
        ceiling=float(_energy_at(rows, peaks).diagonal().mean()),
        chance=float(_own_bins(peaks, rows.shape[1]).sum(axis=1).mean() / (rows.shape[1] - 1)),
    )


def against_shuffled(scores: Array, order: npt.NDArray[np.int64]) -> Shuffled:
    """The mean of ``scores[c, c]`` beside that of ``scores[c, order[c]]``.

    Arguments:
        scores: (K, K).
        order: (P, K), permutations of the classes.
    """
    shuffled = scores[np.arange(len(scores)), order].mean(axis=1)
    return Shuffled.of(float(scores.diagonal().mean()), shuffled)


def _permutations(num_classes: int, seed: int) -> npt.NDArray[np.int64]:
    rows = np.tile(np.arange(num_classes), (NUM_PERMUTATIONS, 1))
    return np.random.default_rng(seed).permuted(rows, axis=1)


def _shares(rows: Tensor) -> Array:
    """(K, F): power spectra of the rows less their mean; each sums to one, without the constant."""
    values = rows.detach().cpu().double().numpy()
    values = values - values.mean(axis=0)
    power: Array = np.abs(np.fft.rfft(values, axis=1)) ** 2
    power[:, 0] = 0
    if values.shape[1] % 2 == 0:
        power[:, -1] /= 2
    total = power.sum(axis=1, keepdims=True)
    if not np.isfinite(total).all() or (total <= 1e-30).any():
        raise UserError(
            "the latents of some classes do not differ from the other classes' at all; there is "
            "no spectrum to show. Train the run for longer, or choose another --block."
        )
    shares: Array = power / total
    return shares


def _own_bins(peaks: npt.NDArray[np.int64], num_bins: int) -> npt.NDArray[np.bool_]:
    """(K, F): whether a bin is within reach of each class's peak; never the constant."""
    bins = np.arange(num_bins)
    own: npt.NDArray[np.bool_] = (np.abs(bins - peaks[:, None]) <= _REACH) & (bins > 0)
    return own


def _energy_at(shares: Array, peaks: npt.NDArray[np.int64]) -> Array:
    """(K, K): each row's share of energy at each class's own frequency."""
    return shares @ _own_bins(peaks, shares.shape[1]).T.astype(np.float64)
