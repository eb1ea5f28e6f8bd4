"""Early exits: accuracy against cost, who leaves where, whether probabilities can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locallearn.analysis.early_exit import ExitRow, ExitStudy
from locallearn.analysis.figures.drawing import (
    BLUE,
    GREY,
    INK,
    SKY,
    VERMILION,
    bare,
    figure_class,
    written,
)


def plot_exits(study: ExitStudy, title: str, path: Path) -> bytes:
    """The figure, as a file's content.

    Arguments:
        study: of a network's exits.
        title: above it all.
        path: its suffix chooses the format (png, svg, pdf).

    Raises:
        UserError: matplotlib is not installed, or does not know the format.
    """
    figure = figure_class()(figsize=(13, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    cost, leaving, trust = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    _draw_cost(cost, study)
    _draw_leaving(leaving, study)
    _draw_trust(trust, study)
    return written(figure, path)


def _draw_cost(axes: Any, study: ExitStudy) -> None:
    points, chosen = study.points, study.chosen
    macs = [point.num_macs / 1e6 for point in points]
    accuracies = [point.accuracy for point in points]
    axes.plot(
        [macs[0], macs[-1]],
        [accuracies[0], accuracies[-1]],
        color=GREY,
        lw=1,
        ls=(0, (4, 3)),
        label="straight line between the ends",
    )
    axes.plot(macs, accuracies, color=BLUE, lw=2, label="early exit, by threshold")
    axes.plot(
        [row.num_macs / 1e6 for row in study.exits],
        [row.accuracy for row in study.exits],
        "o",
        color=SKY,
        mec=BLUE,
        ms=5,
        label="all images leave there",
    )
    axes.axhline(study.accuracy, color=VERMILION, lw=1, label="whole network")
    name = "none leaves" if chosen.threshold > 1 else f"threshold {chosen.threshold:.2f}"
    axes.plot(
        [chosen.num_macs / 1e6],
        [chosen.accuracy],
        "D",
        color=VERMILION,
        ms=7,
        label=f"{name}: {chosen.num_macs / study.num_macs:.2f} of the MACs",
    )
    axes.set_xlabel("multiply-accumulates for an image, millions")
    axes.set_ylabel("accuracy, %")
    axes.set_title("accuracy against cost", fontsize=9.5, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_xlim(left=0)
    bare(axes)


def _draw_leaving(axes: Any, study: ExitStudy) -> None:
    chosen = study.chosen
    places = range(len(study.exits))
    shares = [100 * share for share in chosen.shares]
    axes.barh(places, shares, color=BLUE, height=0.7)
    for place, share, right in zip(places, shares, chosen.accuracies, strict=True):
        text = f" {share:.1f} %" + ("" if right is None else f", {right:.0f} % of them right")
        axes.text(share, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(list(places), [row.name for row in study.exits], fontsize=8)
    axes.invert_yaxis()
    # Room for the words behind the longest bar.
    axes.set_xlim(0, 1.9 * max(shares))
    axes.set_xlabel("share of the images, %")
    axes.set_title("where they leave at that threshold", fontsize=9.5, loc="left")
    bare(axes)


def _draw_trust(axes: Any, study: ExitStudy) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=(0, (4, 3)))
    from matplotlib import colormaps

    count = len(study.exits)
    for place, row in enumerate(study.exits):
        is_output = place == count - 1
        colour = VERMILION if is_output else colormaps["cividis"](0.85 * place / max(1, count - 2))
        axes.plot(
            *_bins(row),
            color=colour,
            marker="o",
            ms=3,
            lw=2 if is_output else 1.2,
            label=f"{row.name}: ECE {100 * row.error_before:.1f} → {100 * row.error_after:.1f} %",
        )
    axes.set_xlabel("confidence, calibrated")
    axes.set_ylabel("accuracy")
    axes.set_title("are they as right as they are sure?", fontsize=9.5, loc="left")
    if count <= 9:
        axes.legend(fontsize=7.5, frameon=False, loc="upper left")
    bare(axes)


_FEWEST = 20  # images of a bin that is drawn: fewer say little


def _bins(row: ExitRow) -> tuple[list[float], list[float]]:
    confidence, accuracy, count = row.reliability
    kept = [place for place, num in enumerate(count) if num >= _FEWEST]
    return [confidence[place] for place in kept], [accuracy[place] for place in kept]
