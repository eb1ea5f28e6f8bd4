"""Temperature and calibration error, by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from locallearn import UserError
from locallearn.engine.exits import calibrate, expected_calibration_error, fit_temperature


def test_error_by_hand() -> None:
    # Two bins of two: confidences 0.6 and 0.7 with one right, 0.9 and 0.9 with both right.
    probabilities = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 0, 1])
    # Of 15 bins 0.6 lies in the 9th (its upper end), 0.7 in the 11th, 0.9 in the 14th.
    by_hand = (abs(1 - 0.6) + abs(0 - 0.7) + 2 * abs(1 - 0.9)) / 4
    assert expected_calibration_error(probabilities, labels) == pytest.approx(by_hand, abs=1e-6)
    # Of two bins all lie in the upper one: mean confidence 0.775, accuracy 3/4.
    assert expected_calibration_error(probabilities, labels, 2) == pytest.approx(0.025, abs=1e-6)


def test_no_probability_is_outside_of_the_bins() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error(sure, torch.tensor([0, 0])) == pytest.approx(0.5)


@pytest.mark.parametrize("true", [0.1, 0.5, 1.0, 4.0])
def test_the_temperature_of_drawn_labels_is_found(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / true).softmax(dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(true, rel=0.1)


def test_it_is_the_least_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 3, generator=generator), torch.arange(50) % 3
    best = fit_temperature(logits + 2 * F.one_hot(labels, 3), labels)

    def loss(temperature: float) -> float:
        shifted = (logits + 2 * F.one_hot(labels, 3)).double()
        return float(F.cross_entropy(shifted / temperature, labels))

    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01))


@pytest.mark.parametrize(("logit", "low", "high"), [(1.0, 1e-3, 0.05), (-1.0, 999.0, 1001.0)])
def test_all_right_or_all_wrong_is_bounded(logit: float, low: float, high: float) -> None:
    logits = torch.tensor([[logit, 0.0], [logit, 0.0]])
    assert low <= fit_temperature(logits, torch.tensor([0, 0])) <= high


def test_each_exit_by_itself() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    found = calibrate({"a": logits * 4, "output": logits / 4}, labels)
    assert found["a"].temperature == pytest.approx(4.0, rel=0.15)
    assert found["output"].temperature == pytest.approx(0.25, rel=0.15)
    for each in found.values():
        assert each.error_after < 0.05 < each.error_before


def test_no_images() -> None:
    with pytest.raises(UserError, match="no images to calibrate"):
        calibrate({"a": torch.empty(0, 3)}, torch.empty(0, dtype=torch.int64))
