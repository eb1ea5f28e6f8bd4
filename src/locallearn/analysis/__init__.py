"""Figures and tables made of recorded numbers. Nothing here trains."""

from locallearn.analysis.figures import plot_confusion

__all__ = ["plot_confusion"]
