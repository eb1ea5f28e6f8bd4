"""Figure 2: spectra of classes' latents beside those of their waves, and the index of each block.

Shapes: K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from locallearn.analysis.figures.drawing import BLUE, GREY, INK, VERMILION, bare, figure_class
from locallearn.analysis.synchrony import Synchrony

_MAX_NAMED_CLASSES = 20


def plot_synchrony(
    results: Sequence[Synchrony | None],
    before: Sequence[Synchrony | None] | None,
    *,
    block_names: Sequence[str],
    place: int,
    class_names: Sequence[str],
    shown: Sequence[int],
    reference: str,
    title: str,
) -> Any:
    """The figure, matplotlib's.

    Arguments:
        results: of each block; None, which leaves a gap, of one without spectra.
        before: the same of the untrained network, or None.
        block_names: of each.
        place: of the block whose spectra are drawn.
        class_names: K names.
        shown: label numbers of the classes whose spectra are drawn.
        reference: what the latents are compared with, in words.
        title: above it all.

    Raises:
        UserError: matplotlib is not installed.
    """
    chosen = results[place]
    assert chosen is not None
    figure = figure_class()(figsize=(12, 1.9 + 1.9 * max(2, len(shown))), layout="constrained")
    figure.suptitle(f"{title}, block {block_names[place]}", fontsize=12, x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    rows = left.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, number in zip(rows, shown, strict=True):
        _draw_spectra(axes, chosen, number, class_names[number])
    rows[0].set_title(
        f"share of the energy: mean latent up, {reference} down",
        fontsize=9.5,
        loc="left",
    )
    rows[-1].set_xlabel("frequency, cycles per place of the latent")
    top, bottom = right.subplots(2, 1, height_ratios=(1.5, 1))
    _draw_energy(top, chosen, class_names)
    _draw_blocks(bottom, results, before, block_names)
    return figure


def _draw_spectra(axes: Any, result: Synchrony, number: int, name: str) -> None:
    f = result.frequencies
    own = f[result.peaks[number]]
    axes.axvline(own, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    for shares, sign, colour in (
        (result.activation[number], 1, BLUE),
        (result.reference[number], -1, VERMILION),
    ):
        axes.vlines(f, 0, sign * shares / shares.max(), color=colour, lw=1.1)
    axes.axhline(0, color=INK, lw=0.6)
    axes.set_xlim(0, 0.5)
    axes.set_ylim(-1.28, 1.28)
    largest = [100 * shares[number].max() for shares in (result.reference, result.activation)]
    axes.set_yticks([-1, 1], [f"{value:.1f} %" for value in largest], fontsize=8)
    for label, colour in zip(axes.get_yticklabels(), (VERMILION, BLUE), strict=True):
        label.set_color(colour)
    axes.set_ylabel(name)
    is_left = own < 0.4
    axes.annotate(
        f"own frequency {own:.3f}: {100 * result.energy[number, number]:.1f} %",
        (own, 1.22),
        xytext=(4 if is_left else -4, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="top",
        fontsize=8,
        color=INK,
        bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.5},
    )
    bare(axes, "left")


def _draw_energy(axes: Any, result: Synchrony, class_names: Sequence[str]) -> None:
    percent = 100 * result.energy
    image = axes.imshow(percent, cmap="cividis", vmin=0)
    axes.set_title("energy of a class's latents at each class's frequency", fontsize=9.5)
    axes.set_ylabel("latents of")
    num = len(class_names)
    if num <= _MAX_NAMED_CLASSES:
        axes.set_xticks(
            range(num), class_names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8
        )
        axes.set_yticks(range(num), class_names, fontsize=8)
    else:
        axes.set_xlabel("frequency of class number")
    axes.figure.colorbar(image, ax=axes, label="% of the energy", shrink=0.9)


def _draw_blocks(
    axes: Any,
    results: Sequence[Synchrony | None],
    before: Sequence[Synchrony | None] | None,
    block_names: Sequence[str],
) -> None:
    places = range(len(results))
    mean, std = (_percent(results, field) for field in ("mean", "std"))
    axes.fill_between(
        places,
        [m - 2 * s for m, s in zip(mean, std, strict=True)],
        [m + 2 * s for m, s in zip(mean, std, strict=True)],
        color=GREY,
        alpha=0.3,
        lw=0,
        label="classes shuffled, ± 2 std",
    )
    axes.plot(places, mean, color=GREY, lw=1)
    if before is not None:
        axes.plot(
            places,
            _percent(before, "value"),
            color=VERMILION,
            marker="s",
            ms=4,
            lw=1.2,
            ls=(0, (4, 2)),
            label="before training",
        )
    axes.plot(
        places, _percent(results, "value"), color=BLUE, marker="o", ms=5, lw=1.6, label="trained"
    )
    axes.set_xticks(list(places), block_names, fontsize=8)
    if len(block_names) > 7:
        axes.tick_params(axis="x", rotation=45)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.set_ylabel("synchrony index, %")
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        columnspacing=1.2,
        borderpad=0,
    )
    bare(axes)


def _percent(results: Sequence[Synchrony | None], field: str) -> list[float]:
    """A value of each block's index; NaN, which leaves a gap, where there is none."""
    return [math.nan if each is None else 100 * getattr(each.index, field) for each in results]
