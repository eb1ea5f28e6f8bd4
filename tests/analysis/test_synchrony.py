"""The synchrony index on latents whose spectrum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from locallearn.analysis.shuffling import Shuffled
from locallearn.analysis.synchrony import against_shuffled, synchrony
from locallearn.errors import UserError
from locallearn.rules import build_basis

K, T = 10, 256


def whole_waves(bins: list[int], length: int = T) -> torch.Tensor:
    """Cosines of whole periods: each has its energy in one bin."""
    t = torch.arange(length, dtype=torch.float64)
    return torch.cos(2 * math.pi / length * torch.tensor(bins, dtype=t.dtype)[:, None] * t)


BINS = [10 * (number + 1) for number in range(K)]


def test_latents_that_are_their_waves_are_synchronised() -> None:
    waves = whole_waves(BINS)
    result = synchrony(waves, waves)
    # Less the mean, a wave keeps 0.9 of its amplitude and takes 0.1 of each of the nine others.
    own = 0.9**2 / (0.9**2 + 9 * 0.1**2)
    assert result.peaks.tolist() == BINS
    assert result.index.value == pytest.approx(own)
    assert result.ceiling == pytest.approx(own)
    assert result.energy[3, 7] == pytest.approx((1 - own) / 9)
    # One ordering in K comes back to a class by chance.
    assert result.index.mean == pytest.approx(1 / K, abs=0.01)
    assert result.index.p_value == 1 / 10_000
    assert result.num_peaks_at_own == K
    assert result.match.value == pytest.approx(1)


def test_what_all_classes_share_counts_for_nothing() -> None:
    waves, common = whole_waves(BINS), 50 + 30 * whole_waves([77])
    shared = synchrony(common + waves, waves)
    assert shared.index.value == pytest.approx(synchrony(waves, waves).index.value)


def test_the_phase_and_the_size_do_not_count() -> None:
    waves = whole_waves(BINS)
    moved = waves.roll(5, dims=1) * 17
    assert synchrony(moved, waves).index.value == pytest.approx(synchrony(waves, waves).index.value)


def test_random_latents_are_at_chance() -> None:
    values = [synchrony(torch.randn(K, T), whole_waves(BINS)).index for _ in range(50)]
    chance = 3 / (T // 2)
    assert np.mean([each.value for each in values]) == pytest.approx(chance, rel=0.1)
    # A p-value of nothing is evenly spread.
    assert 0.35 < np.mean([each.p_value for each in values]) < 0.65
    assert synchrony(torch.randn(K, T), whole_waves(BINS)).chance == chance


def test_waves_of_other_classes_are_no_synchrony() -> None:
    """The waves are all there, but with the wrong classes: worse than shuffled."""
    waves = whole_waves(BINS)
    result = synchrony(waves.roll(1, dims=0), waves)
    assert result.index.value == pytest.approx((1 / K) ** 2 / (0.9**2 + 9 * 0.1**2))
    assert result.index.value < result.index.mean
    assert result.index.p_value > 0.3
    assert result.num_peaks_at_own == 0


def test_noise_hides_a_wave_gradually() -> None:
    waves = whole_waves(BINS)
    noise = torch.randn(K, T, dtype=torch.float64)
    values = [synchrony(waves + size * noise, waves).index.value for size in (0, 1, 3, 30)]
    assert values == sorted(values, reverse=True)
    # Half the energy is the wave's: variance 1/2 beside 1/2.
    half = synchrony(waves + noise / math.sqrt(2), waves).index.value
    assert half == pytest.approx(0.9 * (0.5 + 0.5 * 3 / (T // 2)), abs=0.04)


def test_frequencies_of_the_official_setting_are_folded() -> None:
    """50 radians a place are 7.958 turns, of which -0.042 is left: bin 0.042 * 256 = 10.8."""
    basis = build_basis("cosine", "official", K, T)
    result = synchrony(basis, basis)
    f = np.linspace(50, 512, K) / (2 * math.pi)
    folded = np.abs(f - np.round(f))
    assert np.abs(result.frequencies[result.peaks] - folded).max() <= 0.5 / T
    assert result.frequencies[-1] == 0.5


def test_an_odd_length_has_its_own_bins() -> None:
    result = synchrony(whole_waves([3, 8, 20], 51), whole_waves([3, 8, 20], 51))
    assert result.frequencies[result.peaks].tolist() == [3 / 51, 8 / 51, 20 / 51]


def test_bins_at_the_ends_have_one_neighbour() -> None:
    """The constant is no neighbour of the slowest wave, and nothing is beyond the fastest."""
    waves = whole_waves([1, 16], 32)
    assert synchrony(waves, waves).chance == 2 / 16


def test_the_last_bin_of_an_even_length_counts_once() -> None:
    """Two waves of the same power, of which that of bin T/2 has no twin at -k."""
    t = torch.arange(32, dtype=torch.float64)
    wave = math.sqrt(2) * torch.cos(2 * math.pi * 5 / 32 * t) + torch.cos(math.pi * t)
    result = synchrony(torch.stack([wave, -wave]), whole_waves([3, 8], 32))
    assert result.activation[0, 5] == pytest.approx(0.5)
    assert result.activation[0, 16] == pytest.approx(0.5)


def test_peaks_shuffled_and_frequencies_that_coincide() -> None:
    """Of bins 10, 11, 13, 40, 40 five classes' peaks are within one of: 2, 2, 1, 2, 2."""
    waves = whole_waves([10, 11, 13, 40, 40])
    waves[4] = waves[4].roll(2)  # another wave of the same frequency
    result = synchrony(waves, waves)
    assert result.peaks.tolist() == [10, 11, 13, 40, 40]
    assert result.num_distinct_frequencies == 4
    assert result.num_overlapping == 5  # 11 and 13 share bin 12
    assert result.num_peaks_shuffled == pytest.approx(9 / 5)
    assert synchrony(whole_waves(BINS), whole_waves(BINS)).num_overlapping == 0
    assert synchrony(whole_waves(BINS), whole_waves(BINS)).num_peaks_shuffled == 1


def test_against_shuffled_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [0.5, 0.25]])
    order = np.array([[0, 1], [1, 0], [1, 0]])
    result = against_shuffled(scores, order)
    shuffled = [0.625, 0.25, 0.25]
    expected = Shuffled(0.625, np.mean(shuffled), np.std(shuffled), 2 / 4)
    assert result == expected


def test_nothing_to_show_is_said() -> None:
    waves = whole_waves(BINS)
    with pytest.raises(UserError, match="do not differ from the other classes' at all"):
        synchrony(torch.ones(K, T), waves)
    with pytest.raises(UserError, match="needs two classes and latents of 8 values, got 10 and 4"):
        synchrony(waves[:, :4], waves[:, :4])
    with pytest.raises(UserError, match="do not differ"):
        synchrony(torch.full((K, T), float("nan")), waves)
