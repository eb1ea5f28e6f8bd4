"""Line charts as SVG, drawn once for every theme and width: colours and text sizes are the style
sheet's. Everything a script adds (values under the pointer, hiding a series) it finds by class and
by the data attributes of `<svg>` and `<g class="series">`.

Coordinates are those of the viewBox, y downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

NUM_COLOURS = 8
_NUM_DASHES = 4
_SHAPES = 5
# More points than this in one line can't be told apart.
_MAX_POINTS = 240
_MAX_MARKERS = 16
_NUM_TICKS = 5
_DENSE_ABOVE = 12  # series, whose lines are then thinner
_LABEL_GAP = 15.0  # between the names at the ends of lines
# A range of losses that a linear axis would press to its bottom.
_LOG_ABOVE = 20.0

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A line.

    Arguments:
        label: its name.
        style: number of its look: colour, dashes and markers.
        x, y: as many of both; a gap where y is None.
        spread: half the height of the band around it at each point; none where empty.
        shade: place in a sequence from 0 to 1, which then chooses the colour.
    """

    label: str
    style: int
    x: Values
    y: Values
    spread: Values = ()
    shade: float | None = None

    def points(self) -> list[tuple[int, float, float]]:
        """Number, x and y of every point that is there."""
        pairs = enumerate(zip(self.x, self.y, strict=True))
        return [(i, x, y) for i, (x, y) in pairs if x is not None and y is not None]


@dataclass(frozen=True)
class Size:
    """Of a chart and its margins, units of the viewBox."""

    width: float = 640
    height: float = 340
    left: float = 62
    right: float = 20
    top: float = 16
    bottom: float = 56


_WIDE = Size()
SMALL = Size(width=440, height=270, right=96)


@dataclass(frozen=True)
class Axis:
    """A range of values with ticks.

    Arguments:
        low, high: its ends.
        ticks: places of marks, with their texts.
        is_log: whether equal ratios take equal room.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = field(default=())
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], *, floor: float | None = None) -> Axis:
    """From the tick below the values to the one above them.

    Arguments:
        values: to be shown; at least one.
        floor: the axis goes down to it.
    """
    low, high = min(values), max(values)
    low = low if floor is None else floor
    if high == low:
        low, high = low - 0.5, high + 0.5
    step = nice_step((high - low) / _NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    ticks = tuple((i * step, f"{i * step:,.{decimals}f}") for i in range(first, last + 1))
    return Axis(first * step, last * step, ticks)


def nice_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below a width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= width * (1 - 1e-9))


def count_axis(values: Sequence[float]) -> Axis:
    """Of whole numbers, from the first to the last."""
    low, high = min(values), max(values)
    if low == high:
        return Axis(low - 0.5, high + 0.5, ((low, f"{low:g}"),))
    step = max(1.0, nice_step((high - low) / 6))
    rest = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    # The ends are always there, and nothing so near that texts would touch.
    kept = [v for v in rest if v - low >= 0.6 * step and high - v >= 0.6 * step]
    return Axis(low, high, tuple((v, f"{v:g}") for v in (low, *kept, high)))


def log_axis(values: Sequence[float]) -> Axis:
    """Of positive values, from the tick (1, 2, 5 times a power of ten) below to the one above."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    below = [m for m in marks if m <= low * (1 + 1e-9)]
    above = [m for m in marks if m >= high * (1 - 1e-9)]
    inner = [m for m in marks if below[-1] <= m <= above[0]]
    if len(inner) > 8:
        inner = [m for m in inner if math.isclose(math.log10(m), round(math.log10(m)))]
    return Axis(below[-1], above[0], tuple((m, f"{m:g}") for m in inner), is_log=True)


def loss_axis(values: Sequence[float]) -> Axis:
    """Logarithmic, where the values span so much that most would lie at the bottom."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_ABOVE:
        return log_axis(values)
    return linear_axis(values, floor=0.0 if 0 <= low < 0.5 * high else None)


def ends(series: Sequence[Series]) -> list[float]:
    """Every y, and what bands reach to."""
    values = []
    for each in series:
        for i, _, y in each.points():
            half = (each.spread[i] if each.spread else None) or 0.0
            values += [y - half, y, y + half]
    return values


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    description: str,
    x_axis: Axis,
    y_axis: Axis,
    x_title: str,
    size: Size = _WIDE,
    names_at_ends: bool = False,
) -> Markup:
    """The chart as one `<svg>`.

    Arguments:
        series: to be drawn, the first one lowest.
        name: for scripts to find the chart's values by.
        description: for those who don't see it.
        x_axis, y_axis: ranges.
        x_title: below the x axis.
        size: of the whole.
        names_at_ends: each series' label beside its last point.
    """
    plot = _Plot(x_axis, y_axis, size)
    parts = [plot.grid(x_title)]
    parts += [plot.series(each) for each in series]
    if names_at_ends:
        parts.append(plot.names(series))
    opening = Markup(
        '<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text}" '
        'data-chart="{name}" data-left="{left:g}" data-right="{right:g}" data-top="{top:g}" '
        'data-bottom="{bottom:g}" data-low="{low:.6g}" data-high="{high:.6g}">'
    ).format(
        kind="chart dense" if len(series) > _DENSE_ABOVE else "chart",
        width=size.width,
        height=size.height,
        text=description,
        name=name,
        left=size.left,
        right=plot.right,
        top=size.top,
        bottom=plot.bottom,
        low=x_axis.low,
        high=x_axis.high,
    )
    return opening + Markup("").join(parts) + Markup("</svg>")


def swatch(style: int) -> Markup:
    """A bit of a series' line, for legends."""
    return Markup(
        '<svg class="swatch {look}" viewBox="0 0 30 14" aria-hidden="true">'
        '<path class="line" d="M1 7H29"/><path class="marks" d="{mark}"/></svg>'
    ).format(look=look(style), mark=_marker(style, 15, 7))


def look(style: int) -> str:
    """The classes that say a series' colour and dashes."""
    return f"c{style % NUM_COLOURS} d{style // NUM_COLOURS % _NUM_DASHES}"


class _Plot:
    """The plane that two axes span."""

    def __init__(self, x_axis: Axis, y_axis: Axis, size: Size) -> None:
        self.x_axis, self.y_axis, self.size = x_axis, y_axis, size
        self.right = size.width - size.right
        self.bottom = size.height - size.bottom

    def x(self, value: float) -> float:
        return self.size.left + self.x_axis.share(value) * (self.right - self.size.left)

    def y(self, value: float) -> float:
        if self.y_axis.is_log:
            value = max(value, self.y_axis.low)  # the lower end of a band may be no positive number
        return self.bottom - self.y_axis.share(value) * (self.bottom - self.size.top)

    def grid(self, x_title: str) -> Markup:
        lines = []
        for value, text in self.y_axis.ticks:
            y = self.y(value)
            lines.append(
                Markup(
                    '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                    '<text class="tick y" x="{:.1f}" y="{:.1f}" dy=".35em">{}</text>'
                ).format(self.size.left, self.right, y, y, self.size.left - 8, y, text)
            )
        for value, text in self.x_axis.ticks:
            lines.append(
                Markup('<text class="tick x" x="{:.1f}" y="{:.1f}" dy="1.35em">{}</text>').format(
                    self.x(value), self.bottom, text
                )
            )
        middle = (self.size.left + self.right) / 2
        lines.append(
            Markup('<text class="title" x="{:.1f}" y="{:.1f}" dy="-.35em">{}</text>').format(
                middle, self.size.height, x_title
            )
        )
        return Markup('<g class="grid">') + Markup("").join(lines) + Markup("</g>")

    def series(self, series: Series) -> Markup:
        points = series.points()
        thinned = _thinned(points, _MAX_POINTS)
        parts = []
        if any(series.spread):
            parts.append(Markup('<path class="band" d="{}"/>').format(self._band(series, thinned)))
        parts.append(Markup('<path class="line" d="{}"/>').format(self._line(thinned)))
        if points:
            few = points if len(points) <= _MAX_MARKERS else _spaced(points, series.style)
            marks = "".join(_marker(series.style, self.x(x), self.y(y)) for _, x, y in few)
            parts.append(Markup('<path class="marks" d="{}"/>').format(marks))
        colour = look(series.style)
        if series.shade is not None:
            colour = "shade"
        opening = Markup('<g class="series {}" data-series="{}"{}>').format(
            colour,
            series.label,
            Markup("")
            if series.shade is None
            else Markup(' style="--shade:{:.0f}%"').format(100 * series.shade),
        )
        return opening + Markup("").join(parts) + Markup("</g>")

    def names(self, series: Sequence[Series]) -> Markup:
        """Labels beside the last points, pushed apart where they would overlap."""
        wanted = []
        for each in series:
            points = each.points()
            if points:
                _, x, y = points[-1]
                wanted.append((self.y(y), self.x(x), each))
        wanted.sort(key=lambda item: item[0])
        places = spread_out([y for y, _, _ in wanted], _LABEL_GAP, self.size.top, self.bottom)
        texts = []
        for place, (_, x, each) in zip(places, wanted, strict=True):
            texts.append(
                Markup('<text class="name" x="{:.1f}" y="{:.1f}" dy=".35em">{}</text>').format(
                    x + 9, place, each.label
                )
            )
        return Markup("").join(texts)

    def _line(self, points: Sequence[tuple[int, float, float]]) -> str:
        """Broken where a point is missing between two."""
        steps = []
        before = None
        stride = _stride(points)
        for i, x, y in points:
            is_next = before is not None and i - before <= stride
            steps.append(f"{'L' if is_next else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
            before = i
        return "".join(steps)

    def _band(self, series: Series, points: Sequence[tuple[int, float, float]]) -> str:
        upper, lower = [], []
        for i, x, y in points:
            half = series.spread[i] or 0.0
            upper.append(f"{self.x(x):.1f} {self._inside(y + half):.1f}")
            lower.append(f"{self.x(x):.1f} {self._inside(y - half):.1f}")
        return "M" + "L".join(upper + lower[::-1]) + "Z"

    def _inside(self, value: float) -> float:
        return min(max(self.y(value), self.size.top), self.bottom)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as it takes to lie a gap apart between two ends.

    The gap shrinks where there are too many.
    """
    if len(places) > 1:
        gap = min(gap, (high - low) / (len(places) - 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, low, moved[-1] + gap if moved else low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _thinned(points: list[tuple[int, float, float]], most: int) -> list[tuple[int, float, float]]:
    """Every k-th point, and the last."""
    if len(points) <= most:
        return points
    stride = math.ceil(len(points) / most)
    return [*points[:-1:stride], points[-1]]


def _stride(points: Sequence[tuple[int, float, float]]) -> int:
    """How far apart neighbours are that nothing is missing between."""
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    return min(gaps[:-1] or gaps or [1])


def _spaced(points: list[tuple[int, float, float]], style: int) -> list[tuple[int, float, float]]:
    """A few points, others for each style, so that markers of lines that coincide do not; and the
    last."""
    stride = len(points) // 7
    offset = (1 + 2 * style) % stride
    return [*points[offset:-1:stride], points[-1]]


def _marker(style: int, x: float, y: float) -> str:
    """A closed path around a point."""
    shape = (style + style // NUM_COLOURS) % _SHAPES
    if shape == 0:
        return f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z"
    if shape == 1:
        return f"M{x - 2.8:.1f} {y - 2.8:.1f}h5.6v5.6h-5.6Z"
    if shape == 2:
        return f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4Z"
    if shape == 3:
        return f"M{x:.1f} {y - 3.8:.1f}l3.8 6.6h-7.6Z"
    return f"M{x:.1f} {y + 3.8:.1f}l3.8-6.6h-7.6Z"


def described(title: str, series: Sequence[Series], decimals: int) -> str:
    """A chart's last values in words, for those who don't see it."""
    last = []
    for each in series:
        points = each.points()
        if points:
            last.append(f"{each.label} {points[-1][2]:.{decimals}f}")
    return f"{title}. Last values: {'; '.join(last)}." if last else f"{title}. No values."
