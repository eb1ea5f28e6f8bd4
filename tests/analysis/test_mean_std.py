"""Means and deviations worked by hand."""

from __future__ import annotations

from locallearn.analysis import MeanStd


def test_mean_and_sample_standard_deviation() -> None:
    assert MeanStd.of([90.0, 94.0]) == MeanStd(92.0, 8.0**0.5)
    assert MeanStd.of([90.0]) == MeanStd(90.0, None)
    assert str(MeanStd(92.0, 8.0**0.5)) == "92.00 ± 2.83"
    assert str(MeanStd(92.0, None)) == "92.00"
