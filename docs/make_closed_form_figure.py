"""Draws docs/closed-form.svg and .png: one step of one block, from its input to its new weights.

python docs/make_closed_form_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

# Okabe and Ito's colours, distinct to colour-blind eyes; the same as in make_figure.py.
FORWARD, BACKWARD, HEAD, INK = "#0072B2", "#D55E00", "#009E73", "#222222"
LARGE, SMALL = 7.0, 1.6  # line widths: tensors of an activation's size, and all others
LEFT, RIGHT, BOTTOM, TOP = 0.0, 14.05, -2.0, 9.3  # the block's boundary


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, edge: str) -> None:
    style = "round,pad=0.02,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), w, h, boxstyle=style, fc="white", ec=edge, lw=1.8, zorder=3)
    axes.add_patch(patch)
    place = (x + w / 2, y + h / 2)
    axes.text(*place, text, ha="center", va="center", fontsize=10.5, color=INK, zorder=4)


def flow(axes: Axes, points: list[tuple[float, float]], color: str, width: float) -> None:
    """A tensor's way along horizontal and vertical lines, with a head at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    size = 0.36 if width == LARGE else 0.24
    along = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
    neck = (x1 - size * along[0], y1 - size * along[1])
    xs, ys = zip(*points[:-1], neck, strict=True)
    style = {"solid_joinstyle": "miter", "solid_capstyle": "butt"}
    axes.plot(xs, ys, color=color, lw=width, **style)
    half = (size / 2 * along[1], size / 2 * along[0])
    left, right = (neck[0] + half[0], neck[1] + half[1]), (neck[0] - half[0], neck[1] - half[1])
    axes.add_patch(Polygon([left, right, (x1, y1)], fc=color, ec=color, lw=0.8, zorder=2))


def label(axes: Axes, x: float, y: float, name: str, size: str, ha: str = "center") -> None:
    """A tensor's name, and under it its size; the line between them lies at y."""
    axes.text(x, y, name, ha=ha, va="bottom", fontsize=10.5, color=INK, fontweight="bold")
    axes.text(x, y - 0.03, size, ha=ha, va="top", fontsize=10, color=INK)


def wall(axes: Axes, x: float, y: float, start: float, text: str) -> None:
    """A gradient that would cross the boundary at x, were this backpropagation."""
    axes.plot([start, x], [y, y], color=BACKWARD, lw=1.8, ls=":")
    axes.plot(x, y, marker="X", ms=13, mfc=BACKWARD, mec="white", zorder=5)
    style = {"ha": "center", "va": "top", "fontsize": 10.5, "color": BACKWARD}
    axes.text((start + x) / 2, y - 0.3, text, **style)


def draw_forward(axes: Axes) -> None:
    # x is read twice: by the convolution, and by the weight gradient.
    flow(axes, [(-1.7, 7.0), (2.53, 7.0)], FORWARD, LARGE)
    label(axes, 1.25, 7.6, "x", "(N, C_in, H, W)")
    flow(axes, [(0.8, 7.0), (0.8, 1.3), (2.53, 1.3)], FORWARD, LARGE)
    box(axes, 2.55, 6.4, 1.7, 1.2, "conv\n(or linear)", INK)

    # z is read three times: by the statistics, by the pass forward and by the pass back.
    flow(axes, [(4.27, 7.0), (8.43, 7.0)], FORWARD, LARGE)
    label(axes, 7.4, 7.6, "z", "(N, C, H, W)")
    flow(axes, [(5.4, 7.0), (5.4, 7.98)], FORWARD, LARGE)
    flow(axes, [(6.9, 7.0), (6.9, 1.94)], FORWARD, LARGE)
    box(axes, 4.4, 8.0, 2.0, 0.8, "statistics", INK)
    flow(axes, [(6.42, 8.4), (10.0, 8.4), (10.0, 7.74)], FORWARD, SMALL)
    label(axes, 10.2, 8.4, "mean, inv_std", "(C)", ha="left")

    box(axes, 8.45, 6.28, 3.15, 1.44, "one pass:\nnormalise, activate,\nmax-pool, moments", INK)
    flow(axes, [(11.62, 7.0), (16.0, 7.0)], FORWARD, LARGE)
    label(axes, 12.82, 7.6, "output", "(N, C, H/2, W/2)")
    flow(axes, [(10.0, 6.26), (10.0, 4.82)], FORWARD, SMALL)
    label(axes, 10.2, 5.6, "S0, S1", "(N, C, s, s)", ha="left")


def draw_backward(axes: Axes) -> None:
    box(axes, 8.45, 3.6, 3.15, 1.2, "head: latent p,\nlogits, loss", HEAD)
    flow(axes, [(16.0, 4.45), (11.62, 4.45)], HEAD, SMALL)
    label(axes, 12.82, 5.0, "labels", "(N)")
    flow(axes, [(11.62, 3.9), (12.7, 3.9)], FORWARD, SMALL)
    label(axes, 12.85, 3.9, "loss", "(scalar)", ha="left")

    flow(axes, [(9.7, 3.58), (9.7, 1.5), (9.12, 1.5)], BACKWARD, SMALL)
    label(axes, 9.5, 2.75, "G = dL/dp", "(N, C, s, s)", ha="right")
    flow(axes, [(10.6, 3.58), (10.6, -0.95), (9.12, -0.95)], BACKWARD, SMALL)
    label(axes, 10.8, 2.45, "dL/dgamma", "(C)", ha="left")
    label(axes, 10.8, 1.5, "dL/dbeta", "(C)", ha="left")
    # The pass back needs the first two as well, before they change gamma and beta.
    flow(axes, [(10.6, 1.05), (9.12, 1.05)], BACKWARD, SMALL)
    label(axes, 10.8, -0.1, "dL/dD", "(K, T)", ha="left")

    box(axes, 6.1, 0.7, 3.0, 1.2, "one pass, in place:\nz becomes dL/dz", INK)
    flow(axes, [(6.08, 1.3), (4.27, 1.3)], BACKWARD, LARGE)
    label(axes, 5.17, 1.95, "dL/dz", "(N, C, H, W)")
    box(axes, 2.55, 0.7, 1.7, 1.2, "weight\ngradient", INK)
    flow(axes, [(3.4, 0.68), (3.4, -0.95), (6.08, -0.95)], BACKWARD, SMALL)
    label(axes, 3.6, -0.15, "dL/dW", "(C, C_in, 3, 3)", ha="left")
    box(axes, 6.1, -1.45, 3.0, 1.0, "optimizer steps\nW, gamma, beta, D", INK)


def draw(axes: Axes) -> None:
    axes.set_xlim(-1.9, 16.2)
    axes.set_ylim(-3.8, 9.8)
    axes.set_aspect("equal")
    axes.axis("off")
    boundary = Rectangle((LEFT, BOTTOM), RIGHT - LEFT, TOP - BOTTOM, fill=False, ec=INK, lw=1.3)
    boundary.set_linestyle((0, (5, 4)))
    axes.add_patch(boundary)
    axes.text(0.2, 8.75, "one block, one step", fontsize=13, fontweight="bold", color=INK)
    draw_forward(axes)
    draw_backward(axes)
    wall(axes, RIGHT, 5.9, 16.0, "nothing\ncomes back")
    wall(axes, LEFT, 5.9, -1.7, "nothing\ngoes back")

    key = (
        (-1.6, INK, LARGE, "large: an activation's size"),
        (5.0, INK, SMALL, "small: pooled, per channel or per weight"),
    )
    colours = (
        (-1.6, FORWARD, 3, "forward"),
        (5.0, BACKWARD, 3, "gradients"),
        (9.4, HEAD, 3, "label enters here"),
    )
    for y, entries in ((-2.65, key), (-3.4, colours)):
        for x, color, width, text in entries:
            axes.plot([x, x + 0.7], [y, y], color=color, lw=width, solid_capstyle="butt")
            axes.text(x + 0.95, y, text, va="center", fontsize=10.5, color=INK)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "locallearn"  # the same file from the same source
    figure = Figure(figsize=(9.6, 7.3), layout="constrained")
    draw(figure.subplots())
    here = Path(__file__).parent
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        path = here / f"closed-form.{suffix}"
        figure.savefig(path, dpi=120, facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main()
