"""Figure 3: the classes, arranged by their vectors and coloured by group; each block's silhouette.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locallearn.analysis.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    bare,
    figure_class,
)
from locallearn.analysis.semantics import Embedding
from locallearn.analysis.shuffling import Array, Shuffled

_COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, INK)  # used up, the marker tells
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MANY_CLASSES = 20


def plot_semantics(
    embedding: Embedding,
    scores: Sequence[Shuffled | None],
    *,
    class_names: Sequence[str],
    groups: Sequence[str],
    block_names: Sequence[str],
    place: int,
    what: str,
    title: str,
) -> Any:
    """The figure, matplotlib's.

    Arguments:
        embedding: of the block that is drawn.
        scores: silhouette of each block; None, which leaves a gap, of one without directions.
        class_names, groups: K names each.
        block_names: of each.
        place: of the block that is drawn.
        what: a class's vector is, in words.
        title: above it all.

    Raises:
        UserError: matplotlib is not installed.
    """
    is_large = len(class_names) > _MANY_CLASSES
    figure = figure_class()(figsize=(13, 8) if is_large else (11, 5), layout="constrained")
    figure.suptitle(f"{title}, block {block_names[place]}", fontsize=12, x=0.01, ha="left")
    axes, side = figure.subplots(1, 2, width_ratios=(2.6 if is_large else 1.8, 1))
    _draw_points(axes, embedding, class_names, groups, 7 if is_large else 9)
    axes.set_title(
        f"t-SNE of the classes by {what} (cosine, perplexity {embedding.perplexity:g})",
        fontsize=9.5,
        loc="left",
    )
    _draw_scores(side, scores, block_names)
    return figure


def _draw_points(
    axes: Any,
    embedding: Embedding,
    class_names: Sequence[str],
    groups: Sequence[str],
    font_size: float,
) -> None:
    order = list(dict.fromkeys(sorted(groups)))
    x, y = embedding.points.T
    for number, group in enumerate(order):
        members = [i for i, each in enumerate(groups) if each == group]
        colour = _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[(number // len(_COLOURS) + number) % len(_MARKERS)]
        axes.scatter(x[members], y[members], s=26, color=colour, marker=marker, label=group)
    axes.margins(0.08)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.legend(
        fontsize=font_size,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=2 if len(order) < 8 else 3,
        handletextpad=0.2,
        columnspacing=1,
    )
    axes.figure.draw_without_rendering()  # so that points have their place on the paper
    to_points = 72 / axes.figure.dpi
    places = axes.transData.transform(embedding.points) * to_points
    texts = [name.replace("_", " ") for name in class_names]
    offsets = label_offsets(places, texts, font_size)
    for text, point, offset in zip(texts, embedding.points, offsets, strict=True):
        axes.annotate(
            text,
            point,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=font_size,
            color=INK,
        ).set_in_layout(False)


def label_offsets(
    places: Array, texts: Sequence[str], font_size: float
) -> list[tuple[float, float]]:
    """Where each label goes, from its point to its centre: around it, where it hits the least.

    Arguments:
        places: (K, 2), of the points on paper, in points of 1/72 inch.
        texts: K labels.
        font_size: points.
    """
    half_height = 0.55 * font_size
    boxes = [(x - 3, y - 3, x + 3, y + 3) for x, y in places.tolist()]  # the markers
    offsets = []
    for (x, y), text in zip(places.tolist(), texts, strict=True):
        half_width = 0.29 * font_size * len(text) + 1
        beside, above = half_width + 5, half_height + 5
        around = [(0, above), (0, -above), (beside, 0), (-beside, 0)]
        around += [(u * beside * 0.8, v * above) for u in (1, -1) for v in (1, -1)]

        def box_at(
            offset: tuple[float, float], x: float = x, y: float = y, half_width: float = half_width
        ) -> tuple[float, float, float, float]:
            cx, cy = x + offset[0], y + offset[1]
            return cx - half_width, cy - half_height, cx + half_width, cy + half_height

        def hit(offset: tuple[float, float]) -> float:
            box = box_at(offset)
            return sum(_overlap(box, other) for other in boxes)

        best = min(around, key=hit)
        boxes.append(box_at(best))
        offsets.append(best)
    return offsets


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _draw_scores(axes: Any, scores: Sequence[Shuffled | None], block_names: Sequence[str]) -> None:
    there = {place: score for place, score in enumerate(scores) if score is not None}
    places = list(there)
    axes.errorbar(
        [score.mean for score in there.values()],
        places,
        xerr=[2 * score.std for score in there.values()],
        fmt="|",
        ms=9,
        color=GREY,
        ecolor=GREY,
        elinewidth=5,
        alpha=0.6,
        label="groups shuffled, ± 2 std",
    )
    values = [score.value for score in there.values()]
    axes.plot(values, places, "o", color=BLUE, label="by group")
    axes.axvline(0, color=INK, lw=0.6)
    axes.set_yticks(range(len(scores)), block_names, fontsize=9)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel("silhouette (cosine)")
    axes.set_title("by block", fontsize=9.5, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    bare(axes)
