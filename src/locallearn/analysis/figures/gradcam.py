"""Figure 4: images, and which of their pixels the answers of one or two networks rest on.

Shapes: M images shown, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locallearn.analysis.figures.drawing import figure_class

_MAX_TITLE = 24


@dataclass(frozen=True)
class CamRow:
    """A network's answers.

    name: of the run, in words. heat: (M, H, W). answers: M lines, what it says of each image.
    """

    name: str
    heat: Tensor
    answers: Sequence[str]


def plot_gradcam(
    pictures: Tensor, titles: Sequence[str], rows: Sequence[CamRow], *, heading: str
) -> Any:
    """The figure, matplotlib's.

    Arguments:
        pictures: (M, C, H, W), in [0, 1].
        titles: M lines.
        rows: a network each.
        heading: what the titles are.

    Raises:
        UserError: matplotlib is not installed.
    """
    num = len(pictures)
    figure = figure_class()(
        figsize=(max(5.0, 0.8 + 1.75 * num), 0.4 + 2.05 * (1 + len(rows))), layout="constrained"
    )
    grid = figure.subplots(1 + len(rows), num, squeeze=False)
    for number, (axes, title) in enumerate(zip(grid[0], titles, strict=True)):
        _draw_picture(axes, pictures[number])
        axes.set_title(_short(title), fontsize=9)
    grid[0, 0].set_ylabel(heading, fontsize=9)
    heat_of = None
    for row, line in zip(rows, grid[1:], strict=True):
        for number, axes in enumerate(line):
            _draw_picture(axes, pictures[number].mean(dim=0, keepdim=True))
            positive = row.heat[number].clamp_min(0)
            relative = positive / positive.max().clamp_min(1e-30)
            # Cold pixels show the image, hot ones the heat.
            alpha = 0.75 * relative.sqrt()
            heat_of = axes.imshow(
                relative.cpu(), cmap="inferno", vmin=0, vmax=1, alpha=alpha.cpu().numpy()
            )
            axes.set_title(_short(row.answers[number]), fontsize=9)
        line[0].set_ylabel(row.name, fontsize=9)
    figure.colorbar(
        heat_of,
        ax=grid[1:].ravel().tolist(),
        label="heat, of the image's largest",
        shrink=0.9,
        aspect=30,
    )
    return figure


def _draw_picture(axes: Any, picture: Tensor) -> None:
    values = picture.clamp(0, 1).cpu()
    if len(values) == 1:
        axes.imshow(values[0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(values.permute(1, 2, 0))
    axes.set_xticks([])
    axes.set_yticks([])


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TITLE else text[: _MAX_TITLE - 1] + "…"
