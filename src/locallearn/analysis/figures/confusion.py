"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from locallearn.analysis.figures.drawing import figure_class, written

_MAX_NUMBERED_CLASSES = 20


def plot_confusion(confusion: Tensor, class_names: Sequence[str], title: str, path: Path) -> bytes:
    """A confusion matrix in percent of each true class.

    Arguments:
        confusion: (K, K), counts, true class by row.
        class_names: K names.
        title: above the matrix.
        path: its suffix chooses the format (png, svg, pdf).

    Returns:
        The file's content, for the caller to write.

    Raises:
        UserError: matplotlib is not installed, or does not know the format.
    """
    Figure = figure_class()  # noqa: N806
    num = len(class_names)
    totals = confusion.sum(dim=1, keepdim=True).clamp_min(1)
    percent = (100 * confusion / totals).numpy()
    side = min(14.0, 3.5 + 0.45 * num)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
    axes.set_title(title)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if num <= _MAX_NUMBERED_CLASSES:
        axes.set_xticks(range(num), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(num), class_names)
        for row in range(num):
            for column in range(num):
                value = percent[row, column]
                axes.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if value > 50 else "white",
                )
    figure.colorbar(image, ax=axes, label="share of the true class, %", shrink=0.8)
    return written(figure, path)
