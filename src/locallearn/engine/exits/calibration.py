"""Probabilities that mean what they say: one temperature for each exit.

Shapes: N images, K classes.

A local head of the LLS family compares directions, so that its logits lie between -2 and 2 and its
softmax is never sure; a classifier trained to the end is too sure. Dividing an exit's logits by one
number, chosen on images that nothing was trained on, mends both and changes no class.

Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017
(temperature scaling: section 4.2; expected calibration error: equation 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from locallearn.errors import UserError

NUM_BINS = 15  # of the expected calibration error, as in the source
# Of the temperature: beyond, all classes are alike, or one has it all.
_LEAST, _MOST = 1e-3, 1e3


@dataclass(frozen=True)
class Calibration:
    """Of one exit.

    Attributes:
        temperature: what its logits are to be divided by.
        error_before, error_after: expected calibration error in [0, 1], on the images that the
            temperature was fitted on.
    """

    temperature: float
    error_before: float
    error_after: float


def calibrate(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Calibration]:
    """Each exit's temperature.

    Arguments:
        logits: exit name -> (N, K).
        labels: (N,), int64, of images held out of the training.

    Raises:
        UserError: no images.
    """
    if not len(labels):
        raise UserError("there are no images to calibrate the exits on; give at least one.")
    found = {}
    for name, of_exit in logits.items():
        temperature = fit_temperature(of_exit, labels)
        found[name] = Calibration(
            temperature,
            expected_calibration_error(of_exit.softmax(dim=1), labels),
            expected_calibration_error((of_exit / temperature).softmax(dim=1), labels),
        )
    return found


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which the cross-entropy of the logits is least, within [1e-3, 1e3].

    The cross-entropy is convex in 1 / temperature, so that its slope changes sign once: halved
    until nothing is left between.

    Arguments:
        logits: (N, K).
        labels: (N,), int64.
    """
    logits = logits.double()
    target = logits.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        """Of the summed cross-entropy, by 1 / temperature."""
        expected = ((inverse * logits).softmax(dim=1) * logits).sum(dim=1)
        return float((expected - target).sum())

    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(60):
        middle = math.sqrt(low * high)
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return 1 / math.sqrt(low * high)


def expected_calibration_error(
    probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS
) -> float:
    """Mean distance between confidence and accuracy, in [0, 1].

        sum over bins of  n_b / N |accuracy_b - confidence_b|

    Arguments:
        probabilities: (N, K).
        labels: (N,), int64.
        num_bins: of equal width, over confidences in [0, 1].
    """
    confidence, accuracy, count = reliability(probabilities, labels, num_bins)
    return float(((confidence - accuracy).abs() * count).sum() / count.sum())


def reliability(
    probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy (both in [0, 1], float64; zero of an empty bin) and number of
    images in each bin of confidence, (num_bins,)."""
    sure, classes = probabilities.double().max(dim=1)
    # A bin holds its upper end, as in the source.
    place = (sure * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    right = (classes == labels).double()
    count = torch.bincount(place, minlength=num_bins).double()
    least = count.clamp(min=1)
    confidence = torch.bincount(place, weights=sure, minlength=num_bins) / least
    accuracy = torch.bincount(place, weights=right, minlength=num_bins) / least
    return confidence, accuracy, count
