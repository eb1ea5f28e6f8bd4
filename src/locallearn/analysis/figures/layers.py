"""Each block's own accuracy: over the epochs, and on the test set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from locallearn.analysis.figures.drawing import INK, VERMILION, bare, figure_class
from locallearn.analysis.layers import Curves

_LIGHT = 1.5  # red, green and blue together, above which text on it is dark


def plot_layers(
    curves: Curves, by_block: Mapping[str, float], network: float, *, title: str
) -> Any:
    """The figure, matplotlib's.

    Arguments:
        curves: over the epochs.
        by_block: block name -> accuracy on the test set, percent.
        network: the classifier's, percent.
        title: above it all.

    Raises:
        UserError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    figure = figure_class()(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    over_time, depth = figure.subplots(1, 2, width_ratios=(1.3, 1))
    names = list(by_block)
    # From dark to light with depth; the end of the scale is too light for white paper.
    shades = [colormaps["cividis"](0.85 * i / max(1, len(names) - 1)) for i in range(len(names))]
    marker = "o" if len(curves.epochs) < 15 else None
    lines: list[tuple[str, list[float], Any, Any, float]] = [
        (name, curves.blocks[name], shade, "-", 1.4)
        for name, shade in zip(names, shades, strict=True)
    ]
    lines.append(("network, training", curves.train, VERMILION, (0, (4, 2)), 1.4))
    lines.append(("network, test", curves.test, VERMILION, "-", 2.2))
    for label, values, colour, style, width in lines:
        over_time.plot(
            curves.epochs,
            values,
            color=colour,
            ls=style,
            lw=width,
            marker=marker,
            ms=3,
            label=label,
        )
    over_time.set_xlabel("epoch")
    over_time.set_ylabel("accuracy, %")
    over_time.set_title("each block's own head, training images", fontsize=9.5, loc="left")
    over_time.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = over_time.get_legend_handles_labels()
    over_time.legend(
        handles[::-1],
        labels[::-1],
        fontsize=8,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    bare(over_time)

    places = range(len(names))
    values = [by_block[name] for name in names]
    depth.bar(places, values, color=shades, width=0.7)
    for place, value, shade in zip(places, values, shades, strict=True):
        colour = INK if sum(shade[:3]) > _LIGHT else "white"
        depth.text(place, 1.5, f"{value:.1f}", ha="center", va="bottom", fontsize=9, color=colour)
    depth.axhline(network, color=VERMILION, lw=2)
    depth.set_xlim(-0.6, len(names) - 0.4)
    depth.set_ylim(0, 1.12 * max([network, *values, 1.0]))
    depth.set_title(
        f"each block's own head, test images; line: network {network:.1f} %",
        fontsize=9.5,
        loc="left",
    )
    depth.set_xticks(list(places), names, fontsize=8)
    if len(names) > 7:
        depth.tick_params(axis="x", rotation=45)
    depth.set_ylabel("accuracy, %")
    bare(depth)
    return figure
