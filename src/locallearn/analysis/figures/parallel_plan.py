"""Speed-up against devices, for the ways to spread a training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from locallearn.analysis.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    bare,
    figure_class,
    written,
)

_LINES = {
    "best": ("layers and data, the best of both", BLUE, 3.0),
    "layers": ("layers", GREEN, 1.6),
    "data": ("data", ORANGE, 1.6),
    "gpipe": ("bp, GPipe, its best micro-batches", VERMILION, 1.6),
}


def plot_speedups(
    curves: Mapping[str, Sequence[float | None]], title: str, caption: str, path: Path
) -> bytes:
    """The figure, as a file's content.

    Arguments:
        curves: as `parallel_plan.speedup_curves` makes them: way -> over one device, for 1, 2, ...
        title: above it.
        caption: below it; what is assumed.
        path: its suffix chooses the format (png, svg, pdf).

    Raises:
        UserError: matplotlib is not installed, or does not know the format.
    """
    figure = figure_class()(figsize=(8, 6.4), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10, x=0.01, ha="left")
    axes = figure.subplots()
    most = max(len(values) for values in curves.values())
    highest = max(value for values in curves.values() for value in values if value is not None)
    axes.plot(
        [1, most], [1, most], color=GREY, lw=1, ls=(0, (4, 3)), label="as many times as devices"
    )
    for way, values in curves.items():
        name, colour, width = _LINES[way]
        devices = range(1, len(values) + 1)
        heights = [math.nan if value is None else value for value in values]
        axes.plot(devices, heights, color=colour, lw=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [2**power for power in range(int(math.log2(most)) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    heights = [2**power for power in range(math.ceil(math.log2(max(2, highest))) + 1)]
    axes.set_yticks(heights, [str(height) for height in heights])
    axes.set_ylim(0.5, 1.15 * max(2, highest))
    axes.set_xlabel("devices")
    axes.set_ylabel("speed-up over one device of the same rule")
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    bare(axes)
    figure.supxlabel("\n".join(textwrap.wrap(caption, 130)), fontsize=7.5, x=0.01, ha="left")
    return written(figure, path)
