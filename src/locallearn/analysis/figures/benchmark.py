"""A benchmark's step times and memory as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locallearn.analysis.figures.drawing import BLUE, SKY, VERMILION, figure_class, written


def side_name(row: dict[str, Any]) -> str:
    """A side of a benchmark in a few words: its backend tells a local rule's path."""
    rule, path, backend = row["rule"], row["path"], row["backend"]
    how = path.partition(", ")[2]  # "graph", "graph, overlapped" or nothing
    if rule == "bp" and not path.startswith("backprop"):
        return f"bp, {path}"
    update = f", {row['update']} update" if "update" in row else ""
    return f"{rule} ({backend}{', ' + how if how else ''}{update})"


def three_digits(value: float) -> str:
    """A time, which may be of microseconds on one device and of seconds on another."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def plot_benchmark(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bytes:
    """Step time and peak activation memory of each side of a benchmark, as bars.

    Arguments:
        rows: as `locallearn bench --json` writes them.
        title: above both.
        path: its suffix chooses the format (png, svg, pdf).

    Returns:
        The file's content, for the caller to write.

    Raises:
        UserError: matplotlib is not installed, or does not know the format.
    """
    figure = figure_class()(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    figure.suptitle(title)
    times, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    names = [side_name(row) for row in rows]
    colours = [
        VERMILION if row["rule"] == "bp" else SKY if row["path"] == "generic" else BLUE
        for row in rows
    ]
    median = [row["step_time_ms_median"] for row in rows]
    spread = [
        [m - row["step_time_ms_p20"] for m, row in zip(median, rows, strict=True)],
        [row["step_time_ms_p80"] - m for m, row in zip(median, rows, strict=True)],
    ]
    times.barh(places, median, color=colours, xerr=spread, error_kw={"ecolor": "#333333"})
    mib = [row["peak_activation_mib"] for row in rows]
    memory.barh(places, mib, color=colours)
    slowest = [row["step_time_ms_p80"] for row in rows]
    texts = [three_digits(m) for m in median], [f"{m:.1f}" for m in mib]
    for axes, ends, words in zip((times, memory), (slowest, mib), texts, strict=True):
        for place, end, text in zip(places, ends, words, strict=True):
            axes.text(end, place, f"  {text}", va="center", ha="left", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    times.set_yticks(list(places), names)
    times.invert_yaxis()
    times.set_xlabel("ms a step (bar: median, whisker: p20 to p80)")
    memory.set_xlabel("peak activation memory, MiB")
    return written(figure, path)
