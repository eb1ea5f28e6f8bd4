"""Draws docs/how-it-works.svg and .png: one local step beside one step of backpropagation.

python docs/make_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe and Ito's colours, distinct to colour-blind eyes.
FORWARD, BACKWARD, HEAD, INK = "#0072B2", "#D55E00", "#009E73", "#222222"
BLOCKS = ["block 1", "block 2", "block 3"]


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, edge: str, **more) -> None:
    style = "round,pad=0.02,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), w, h, boxstyle=style, fc="white", ec=edge, lw=1.8, **more)
    axes.add_patch(patch)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10.5, color=INK)


def arrow(axes: Axes, start, end, color: str, bend: float = 0.0, style: str = "-") -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            lw=1.8,
            color=color,
            linestyle=style,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=3,
            shrinkB=3,
        )
    )


def frame(axes: Axes, title: str) -> None:
    axes.set_xlim(-0.3, 12.7)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK)


def draw_backprop(axes: Axes) -> None:
    frame(axes, "Backpropagation: every layer waits for the last one")
    axes.set_ylim(-0.75, 2.3)
    axes.text(0.3, 1.0, "images", ha="center", va="center", fontsize=10.5, color=INK)
    names = [*BLOCKS, "classifier"]
    for i, name in enumerate(names):
        x = 1.3 + 2.5 * i
        box(axes, x, 0.5, 1.7, 1.0, name, INK)
        height = 1.25 if i else 1.0
        arrow(axes, (x - (0.75 if i else 0.42), height), (x - 0.02, height), FORWARD)
        if i:
            arrow(axes, (x - 0.02, 0.75), (x - 0.75, 0.75), BACKWARD)
    axes.text(11.9, 1.25, "loss", ha="center", va="center", fontsize=10.5, color=INK)
    arrow(axes, (10.6, 1.25), (11.5, 1.25), FORWARD)
    arrow(axes, (11.8, 0.95), (10.6, 0.7), BACKWARD, bend=-0.25)
    axes.text(
        6.0,
        -0.35,
        "every block's activations stay in memory until the gradient comes back to it",
        ha="center",
        fontsize=10.5,
        color=BACKWARD,
    )


def draw_local(axes: Axes) -> None:
    frame(axes, "Local learning (LLS): each block updates at once and forgets")
    axes.set_ylim(-3.2, 2.1)
    axes.text(0.3, 1.0, "images", ha="center", va="center", fontsize=10.5, color=INK)
    for i, name in enumerate(BLOCKS):
        x = 1.3 + 2.9 * i
        box(axes, x, 0.5, 1.9, 1.0, name, INK)
        arrow(axes, (x - (0.95 if i else 0.42), 1.0), (x - 0.02, 1.0), FORWARD)
        box(axes, x, -1.5, 1.9, 1.1, "pooled latent\nagainst the\nclasses' waves", HEAD)
        arrow(axes, (x + 0.6, 0.48), (x + 0.6, -0.36), FORWARD)
        arrow(axes, (x + 1.3, -0.36), (x + 1.3, 0.48), BACKWARD)
        if i:
            gap = x - 0.5
            axes.plot([gap, gap], [-1.7, 1.85], color=INK, lw=1.1, ls=(0, (4, 3)))
    gap = 1.3 + 2.9 * 3 - 0.5
    axes.plot([gap, gap], [-1.7, 1.85], color=INK, lw=1.1, ls=(0, (4, 3)))
    x = 1.3 + 2.9 * 3
    arrow(axes, (x - 0.95, 1.0), (x - 0.02, 1.0), FORWARD)
    box(axes, x, 0.5, 1.7, 1.0, "classifier", INK)
    box(axes, x, -1.5, 1.7, 1.1, "loss", HEAD)
    arrow(axes, (x + 0.5, 0.48), (x + 0.5, -0.36), FORWARD)
    arrow(axes, (x + 1.2, -0.36), (x + 1.2, 0.48), BACKWARD)
    axes.text(
        6.2,
        -2.2,
        "no gradient crosses a dashed line; a block's memory is freed before the next block runs",
        ha="center",
        fontsize=10.5,
        color=INK,
    )
    for place, color, text in (
        (2.2, FORWARD, "activations"),
        (5.4, BACKWARD, "gradients"),
        (8.4, HEAD, "label enters here"),
    ):
        axes.plot([place, place + 0.5], [-2.9, -2.9], color=color, lw=3)
        axes.text(place + 0.65, -2.9, text, va="center", fontsize=10.5, color=INK)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "locallearn"  # the same file from the same source
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3.05, 5.3])
    draw_backprop(top)
    draw_local(bottom)
    here = Path(__file__).parent
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        path = here / f"how-it-works.{suffix}"
        figure.savefig(path, dpi=120, facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main()
