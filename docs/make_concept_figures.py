"""Draws the pictures of docs/concepts.md: concept-blocks, concept-finding and concept-head.

python docs/make_concept_figures.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from make_figure import BACKWARD, FORWARD, HEAD, INK, arrow, box
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

GREY = "#777777"
FONT_SIZE = 10.5


def blank(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")


def border(axes: Axes, x: float, y: float, w: float, h: float, title: str) -> None:
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, fc="none", ec=INK, lw=1.2, ls=(0, (4, 3)))
    )
    axes.text(x + 0.12, y + h + 0.12, title, fontsize=FONT_SIZE, fontweight="bold", color=INK)


def label(axes: Axes, x: float, y: float, text: str, color: str = INK, **more: str) -> None:
    where = {"ha": "center", "va": "center"} | more
    axes.text(x, y, text, fontsize=FONT_SIZE, color=color, **where)


def cross(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], marker="X", ms=8, mfc=BACKWARD, mec="white", mew=0.8, zorder=5)


# -- what crosses a border -------------------------------------------------------------------------


def draw_blocks(axes: Axes) -> None:
    blank(axes, 15.2, 6.6)
    label(axes, 0.5, 3.6, "images")
    lefts = (1.3, 5.2, 9.1)
    insides = (["conv", "norm", "ReLU"], ["conv", "conv"], ["conv", "norm", "ReLU"])
    for number, (left, inside) in enumerate(zip(lefts, insides, strict=True), 1):
        border(axes, left, 0.9, 3.2, 3.6, f"block {number}")
        draw_inside(axes, left, inside)
        box(axes, left + 0.75, 1.15, 1.7, 0.8, "local head", HEAD)
        arrow(axes, (left + 2.2, 3.2), (left + 2.2, 1.98), FORWARD)
        arrow(axes, (left + 1.1, 1.98), (left + 1.1, 3.2), BACKWARD)
        arrow(axes, (left + 1.0, 2.62), (left + 0.06, 2.62), BACKWARD)
        cross(axes, left, 2.62)
        arrow(axes, (left + 1.6, 0.35), (left + 1.6, 1.12), HEAD)
    for start, end in ((0.95, 1.35), (4.45, 5.25), (8.35, 9.15), (12.25, 12.95)):
        arrow(axes, (start, 3.6), (end, 3.6), FORWARD)
    # A skip connection past block 2: a tensor like any other.
    axes.plot([4.8, 4.8, 8.75, 8.75], [3.6, 5.1, 5.1, 4.0], color=FORWARD, lw=1.8)
    arrow(axes, (8.75, 4.1), (8.75, 3.6), FORWARD)
    label(axes, 6.8, 5.4, "a skip connection past a block: a tensor like any other")
    box(axes, 12.95, 3.2, 1.7, 0.8, "output layer", INK)
    box(axes, 12.95, 1.15, 1.7, 0.8, "loss", HEAD)
    arrow(axes, (14.1, 3.18), (14.1, 1.98), FORWARD)
    arrow(axes, (13.5, 1.98), (13.5, 3.18), BACKWARD)
    arrow(axes, (13.4, 2.62), (12.4, 2.62), BACKWARD)
    cross(axes, 12.33, 2.62)
    arrow(axes, (13.8, 0.35), (13.8, 1.12), HEAD)
    axes.plot([2.9, 13.8], [0.35, 0.35], color=HEAD, lw=1.8)
    label(axes, 1.3, 0.35, "labels", HEAD)
    axes.plot([1.75, 2.9], [0.35, 0.35], color=HEAD, lw=1.8)
    for place, color, text in (
        (1.3, FORWARD, "activations: cross borders"),
        (6.2, BACKWARD, "gradients: end at the border"),
        (11.2, HEAD, "the label enters at each head"),
    ):
        axes.plot([place, place + 0.5], [6.3, 6.3], color=color, lw=3)
        label(axes, place + 0.65, 6.3, text, ha="left")


def draw_inside(axes: Axes, left: float, names: list[str]) -> None:
    """The layers of a block; of two, with a skip connection around them."""
    width = 0.85 if len(names) == 3 else 1.0
    step = 0.95 if len(names) == 3 else 1.3
    first = left + (3.2 - step * (len(names) - 1) - width) / 2
    for i, name in enumerate(names):
        box(axes, first + i * step, 3.25, width, 0.7, name, INK)
    if len(names) == 2:
        arrow(axes, (first + width, 3.6), (first + step, 3.6), FORWARD)
        arrow(axes, (left + 0.1, 3.75), (left + 3.1, 3.75), FORWARD, bend=-0.28)


# -- how blocks are found --------------------------------------------------------------------------

# Rows of a tree: depth, name, class, and what becomes of it.
BLOCK, OUTPUT, JOINS, BETWEEN, INSIDE = FORWARD, BACKWARD, HEAD, GREY, "#bbbbbb"
Row = tuple[int, str, str, str, str]

RESNET: list[Row] = [
    (0, "model", "ResNet", "", INSIDE),
    (1, "conv1", "Conv2d", "a chain of loose layers:", BLOCK),
    (1, "bn1", "BatchNorm2d", "one block, conv1", BLOCK),
    (1, "relu", "ReLU", "", BLOCK),
    (1, "maxpool", "MaxPool2d", "runs between blocks", BETWEEN),
    (1, "layer1", "Sequential", "a stage: looked into", INSIDE),
    (2, "0", "BasicBlock", "a block, layer1.0", BLOCK),
    (2, "1", "BasicBlock", "a block, layer1.1", BLOCK),
    (1, "layer2", "Sequential", "a stage: looked into", INSIDE),
    (2, "0", "BasicBlock", "a block, layer2.0", BLOCK),
    (2, "1", "BasicBlock", "a block, layer2.1", BLOCK),
    (1, "avgpool", "AdaptiveAvgPool2d", "runs behind the blocks", BETWEEN),
    (1, "fc", "Linear", "the output layer", OUTPUT),
]
TRANSFORMER: list[Row] = [
    (0, "model", "VisionTransformer", "", INSIDE),
    (1, "class_token", "Parameter", "in no block: these learn", JOINS),
    (1, "positions", "Parameter", "with the block that reads", JOINS),
    (1, "patches", "Conv2d", "them, layers.0", JOINS),
    (1, "layers", "ModuleList", "a stage: looked into", INSIDE),
    (2, "0", "EncoderLayer", "a block, layers.0", BLOCK),
    (2, "1", "EncoderLayer", "a block, layers.1", BLOCK),
    (2, "2", "EncoderLayer", "a block, layers.2", BLOCK),
    (1, "norm", "LayerNorm", "the output layer:", OUTPUT),
    (1, "head", "Linear", "all behind the last block", OUTPUT),
]
ROW_HEIGHT = 0.42


def draw_tree(axes: Axes, title: str, rows: list[Row]) -> None:
    height = ROW_HEIGHT * (len(RESNET) + 2)
    blank(axes, 8.0, height)
    axes.set_anchor("NW")
    axes.text(0, height - 0.3, title, fontsize=12, fontweight="bold", color=INK)
    for number, (depth, name, kind, fate, color) in enumerate(rows):
        y = height - ROW_HEIGHT * (number + 2)
        if color != INSIDE:
            joined = number + 1 < len(rows) and is_one(rows[number], rows[number + 1])
            bottom = -0.04 if joined else 0.04
            axes.add_patch(
                Rectangle((0, y - 0.13 + bottom), 0.14, ROW_HEIGHT - bottom - 0.04, fc=color)
            )
        axes.text(0.35 + 0.4 * depth, y, name, fontsize=FONT_SIZE, family="monospace", color=INK)
        axes.text(2.3, y, kind, fontsize=FONT_SIZE, family="monospace", color=GREY)
        shown = INK if color == INSIDE else color
        axes.text(4.75, y, fate, fontsize=FONT_SIZE, color=GREY if color == INSIDE else shown)


def is_one(row: Row, following: Row) -> bool:
    """Whether two rows are layers of one chain, or of what is treated alike."""
    return row[4] == following[4] and row[0] == following[0] == 1


def draw_finding(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_tree(left, "A residual network", RESNET)
    draw_tree(right, "A transformer", TRANSFORMER)


# -- what a head reads -----------------------------------------------------------------------------


def cells(axes: Axes, x: float, y: float, columns: int, rows: int, size: float, lines: int) -> None:
    """A grid of values, with the borders of what is pooled together every ``lines`` of them."""
    shade = np.random.default_rng(3).uniform(0.1, 0.75, (rows, columns))
    for i in range(rows):
        for j in range(columns):
            where = (x + j * size, y + i * size)
            face = matplotlib.colors.to_rgba(FORWARD, shade[i, j])
            axes.add_patch(Rectangle(where, size, size, fc=face, ec="white", lw=0.5))
    for j in range(0, columns + 1, lines if columns > 1 else 1):
        axes.plot([x + j * size] * 2, [y, y + rows * size], color=INK, lw=1.2)
    for i in range(0, rows + 1, lines if rows > 1 else 1):
        axes.plot([x, x + columns * size], [y + i * size] * 2, color=INK, lw=1.2)


def draw_outputs(axes: Axes) -> None:
    """The shapes that a block's output may have, and how each is pooled."""
    axes.text(0.2, 7.55, "a block's output", fontsize=12, fontweight="bold", color=INK)
    cells(axes, 0.4, 5.6, 8, 8, 0.18, 2)
    label(axes, 2.3, 6.55, "(N, C, H, W)", ha="left", family="monospace")
    label(axes, 2.3, 6.1, "each channel: means\nof at most 4 x 4 cells", GREY, ha="left", va="top")
    cells(axes, 0.4, 4.3, 8, 1, 0.18, 2)
    label(axes, 2.3, 4.6, "(N, C, L)", ha="left", family="monospace")
    label(axes, 2.3, 4.3, "each channel: 4 means", GREY, ha="left")
    cells(axes, 0.4, 2.75, 8, 1, 0.18, 8)
    label(axes, 2.3, 3.05, "(N, L, C)", ha="left", family="monospace")
    label(axes, 2.3, 2.75, "tokens: the mean\nof the sequence", GREY, ha="left", va="top")
    cells(axes, 0.4, 1.0, 8, 1, 0.18, 1)
    label(axes, 2.3, 1.25, "(N, F)", ha="left", family="monospace")
    label(axes, 2.3, 0.95, "as it is, or means\ndown to 2048", GREY, ha="left", va="top")


def draw_head(axes: Axes) -> None:
    blank(axes, 16.2, 8.0)
    draw_outputs(axes)
    for y in (6.2, 4.4, 2.8, 1.1):
        arrow(axes, (5.15, y), (6.1, 4.0 + 0.12 * (y - 3.6)), FORWARD)
    axes.text(6.0, 7.55, "latent p", fontsize=12, fontweight="bold", color=INK)
    rng = np.random.default_rng(5)
    values = 0.55 * np.sin(0.9 * np.arange(16)) + 0.25 * rng.normal(size=16)
    bars(axes, 6.3, 4.0, values, 0.1, 1.0, FORWARD)
    label(axes, 7.2, 2.75, "T values, at most 2048,\nscaled to length one", GREY, va="top")
    axes.text(9.2, 7.55, "against a wave for each class", fontsize=12, fontweight="bold", color=INK)
    turns = np.linspace(0, 1, 200)
    waves: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda t, f=f: np.sign(np.sin(2 * np.pi * f * t)) for f in (2.3, 3.7, 5.1)
    ]
    for row, wave in enumerate(waves):
        y = 6.2 - 1.9 * row
        axes.plot(9.9 + 2.2 * turns, y + 0.4 * wave(turns), color=HEAD, lw=1.4)
        label(axes, 9.75, y, f"class {row}", ha="right")
        arrow(axes, (8.35, 4.0 + 0.3 * (1 - row)), (8.95, 4.0 + 0.6 * (1 - row)), FORWARD)
        value = (0.25, 0.85, 0.1)[row]
        axes.add_patch(Rectangle((12.5, y - 0.15), value, 0.3, fc=INK))
    label(axes, 12.9, 1.6, "K cosines,\nthe local logits", GREY)
    arrow(axes, (13.6, 4.3), (14.2, 4.3), FORWARD)
    box(axes, 14.25, 3.85, 1.75, 0.9, "cross-\nentropy", HEAD)
    arrow(axes, (15.1, 5.7), (15.1, 4.8), HEAD)
    label(axes, 15.1, 5.95, "label", HEAD)
    arrow(axes, (15.1, 3.83), (15.1, 2.9), BACKWARD)
    label(axes, 15.1, 2.35, "gradient of\nthis block, and\nof no other", BACKWARD)


def bars(
    axes: Axes, x: float, y: float, values: np.ndarray, width: float, scale: float, color: str
) -> None:
    for i, value in enumerate(values):
        axes.add_patch(Rectangle((x + 1.2 * width * i, y), width, scale * value, fc=color))
    axes.plot([x, x + 1.2 * width * len(values)], [y, y], color=INK, lw=0.8)


def save(figure: Figure, name: str) -> None:
    here = Path(__file__).parent
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        path = here / f"{name}.{suffix}"
        figure.savefig(path, dpi=120, facecolor="white", metadata=metadata)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "locallearn"  # the same file from the same source
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    draw_blocks(figure.subplots())
    save(figure, "concept-blocks")
    figure = Figure(figsize=(11.4, 4.5), layout="constrained")
    draw_finding(figure)
    save(figure, "concept-finding")
    figure = Figure(figsize=(11.0, 5.5), layout="constrained")
    draw_head(figure.subplots())
    save(figure, "concept-head")


if __name__ == "__main__":
    main()
