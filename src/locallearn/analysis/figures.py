"""Figures, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from locallearn.errors import UserError

_MAX_NUMBERED_CLASSES = 20


# Colours that stay apart for the colour-blind (Okabe and Ito).
_OURS, _GENERIC, _BACKPROP = "#0072b2", "#56b4e9", "#d55e00"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'locallearn[plot]'.") from error
    return Figure


def side_name(row: dict[str, Any]) -> str:
    """A side of a benchmark in a few words: its backend tells a local rule's path."""
    rule, path, backend = row["rule"], row["path"], row["backend"]
    how = path.partition(", ")[2]  # "graph", "graph, overlapped" or nothing
    if rule == "bp" and not path.startswith("backprop"):
        return f"bp, {path}"
    return f"{rule} ({backend}{', ' + how if how else ''})"


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
    figure = _figure_class()(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    figure.suptitle(title)
    times, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    names = [side_name(row) for row in rows]
    colours = [
        _BACKPROP if row["rule"] == "bp" else _GENERIC if row["path"] == "generic" else _OURS
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
    ends = [row["step_time_ms_p80"] for row in rows]
    for axes, values, beside in ((times, median, ends), (memory, mib, mib)):
        for place, value, end in zip(places, values, beside, strict=True):
            axes.text(end, place, f"  {value:.1f}", va="center", ha="left", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    times.set_yticks(list(places), names)
    times.invert_yaxis()
    times.set_xlabel("ms a step (bar: median, whisker: p20 to p80)")
    memory.set_xlabel("peak activation memory, MiB")
    return _written(figure, path)


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
    Figure = _figure_class()  # noqa: N806
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
    return _written(figure, path)


def _written(figure: Any, path: Path) -> bytes:
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".").lower() or "png"
    try:
        figure.savefig(buffer, format=kind, dpi=150)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}.") from error
    return buffer.getvalue()
