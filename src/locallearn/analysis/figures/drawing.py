"""What every figure shares: matplotlib (the extra `plot`), colours, and files in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from locallearn.errors import UserError

# Colours that stay apart for the colour-blind (Okabe and Ito).
BLUE, SKY, VERMILION, GREEN = "#0072b2", "#56b4e9", "#d55e00", "#009e73"
ORANGE, PINK, INK, GREY = "#e69f00", "#cc79a7", "#222222", "#8c8c8c"

# An SVG's text stays text, not outlines: where the file itself is opened it can be searched.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "locallearn"}


def figure_class() -> Any:
    """matplotlib's Figure. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures are drawn by matplotlib: pip install 'locallearn[plot]'."
        ) from error
    return Figure


def written(figure: Any, path: Path) -> bytes:
    """The figure as a file's content.

    Arguments:
        figure: matplotlib's.
        path: its suffix chooses the format (png, svg, pdf).

    Raises:
        UserError: a format that matplotlib does not know.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".").lower() or "png"
    # A date, as ids that are drawn anew, would make every file of the same figure another one.
    dated = {"metadata": {"Date": None}} if kind == "svg" else {}
    try:
        with rc_context(_SVG):
            figure.savefig(buffer, format=kind, dpi=150, **dated)
    except ValueError as error:
        raise UserError(f"{path} can't be drawn: {error}.") from error
    return buffer.getvalue()


def bare(axes: Any, *more: str) -> None:
    """Without the lines above and to the right, nor those named."""
    axes.spines[["top", "right", *more]].set_visible(False)
