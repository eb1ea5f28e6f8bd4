"""Figures, drawn with matplotlib (the extra `plot`)."""

from locallearn.analysis.figures.benchmark import plot_benchmark, side_name, three_digits
from locallearn.analysis.figures.confusion import plot_confusion

__all__ = ["plot_benchmark", "plot_confusion", "side_name", "three_digits"]
