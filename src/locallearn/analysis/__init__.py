"""Figures and tables made of recorded numbers. Nothing here trains."""

from locallearn.analysis.cost import Cost, step_cost
from locallearn.analysis.figures import plot_benchmark, plot_confusion, side_name

__all__ = ["Cost", "plot_benchmark", "plot_confusion", "side_name", "step_cost"]
