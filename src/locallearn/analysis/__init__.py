"""Figures and tables made of recorded numbers. Nothing here trains."""

from locallearn.analysis.blocks import BlockCost, ModelCost, count_blocks
from locallearn.analysis.cost import Cost, run_cost, step_cost
from locallearn.analysis.figures import plot_benchmark, plot_confusion, side_name, three_digits
from locallearn.analysis.mean_std import MeanStd

__all__ = [
    "BlockCost",
    "Cost",
    "MeanStd",
    "ModelCost",
    "count_blocks",
    "plot_benchmark",
    "plot_confusion",
    "run_cost",
    "side_name",
    "step_cost",
    "three_digits",
]
