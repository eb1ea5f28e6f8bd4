"""Charts, point by point."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from locallearn.analysis.report.charts import (
    Axis,
    Series,
    Size,
    count_axis,
    line_chart,
    linear_axis,
    log_axis,
    look,
    loss_axis,
    nice_step,
    spread_out,
    swatch,
)

# A plot of 100 x 100 whose corner at the lower left is (10, 110).
SQUARE = Size(width=120, height=130, left=10, right=10, top=10, bottom=20)


def draw(*series: Series, y_axis: Axis | None = None, **options) -> ET.Element:
    """The chart over x from 0 to 10 and y from 0 to 50."""
    axes = {"x_axis": Axis(0, 10), "y_axis": y_axis or Axis(0, 50)}
    given = {"name": "n", "description": "d", "x_title": "x", "size": SQUARE, **axes, **options}
    return ET.fromstring(line_chart(series, **given))


def path_of(chart: ET.Element, kind: str) -> str:
    (path,) = chart.iterfind(f".//g[@data-series]/path[@class='{kind}']")
    return path.attrib["d"]


def test_line_and_band_by_hand() -> None:
    chart = draw(Series("a", 0, [0, 5, 10], [0, 25, 50], [5, 0, 10]))
    assert path_of(chart, "line") == "M10.0 110.0L60.0 60.0L110.0 10.0"
    # 5 of 50 are a tenth of the height; what leaves the plot ends at its edge.
    upper, lower = "M10.0 100.0L60.0 60.0L110.0 10.0", "L110.0 30.0L60.0 60.0L10.0 110.0Z"
    assert path_of(chart, "band") == upper + lower


def test_logarithmic_axis_by_hand() -> None:
    axis = Axis(0.01, 100, is_log=True)
    chart = draw(Series("a", 0, [0, 10], [1, 10], [2, 0]), y_axis=axis)
    assert path_of(chart, "line") == "M10.0 60.0L110.0 35.0"
    assert path_of(chart, "band").endswith("L110.0 35.0L10.0 110.0Z")  # 1 - 2 has no logarithm


def test_one_point_is_shown() -> None:
    chart = draw(Series("a", 0, [5], [25]))
    assert path_of(chart, "marks").startswith("M57.0 60.0a3 3")


def test_a_missing_value_breaks_the_line() -> None:
    chart = draw(Series("a", 0, [0, 2, 4, 6, 8], [0, 10, None, 30, 40]))
    assert path_of(chart, "line") == "M10.0 110.0L30.0 90.0M70.0 50.0L90.0 30.0"
    assert not draw(Series("a", 0, [0], [None])).findall(".//path[@class='marks']")


def test_long_lines_are_thinned_to_their_ends() -> None:
    num = 10_001
    x = [10 * i / (num - 1) for i in range(num)]
    chart = draw(Series("a", 0, x, x, [0.1] * num))
    line = path_of(chart, "line")
    assert line.count("M") == 1
    assert line.count("L") <= 240
    assert line.startswith("M10.0 110.0")
    assert line.endswith("L110.0 90.0")
    assert path_of(chart, "marks").count("M") < 12


def test_ticks_are_where_their_values_are() -> None:
    axis = Axis(0, 50, ((0, "0"), (25, "25")))
    texts = draw(y_axis=axis, x_axis=Axis(1, 3, ((1, "one"), (2, "two")))).findall(".//text")
    places = {text.text: (text.attrib["x"], text.attrib["y"]) for text in texts}
    assert places["25"] == ("2.0", "60.0")
    assert (places["one"], places["two"]) == (("10.0", "110.0"), ("60.0", "110.0"))


def test_names_at_ends_do_not_overlap() -> None:
    series = [Series(name, 0, [0, 5], [0, y]) for name, y in (("a", 49), ("b", 50), ("c", 10))]
    chart = draw(*series, names_at_ends=True)
    places = {t.text: float(t.attrib["y"]) for t in chart.findall(".//text[@class='name']")}
    assert places["b"] == 10
    assert places["a"] == 25
    assert places["c"] == 90


def test_what_runs_are_called_is_text() -> None:
    evil = '"><script>alert(1)</script>'
    series = Series(evil, 0, [0, 1], [0, 1])
    svg = line_chart(
        [series],
        name="n",
        description=evil,
        x_axis=Axis(0, 1, ((0, evil),)),
        y_axis=Axis(0, 1),
        x_title=evil,
        names_at_ends=True,
    )
    assert "<script" not in svg
    assert ET.fromstring(svg).find("g[@data-series]").attrib["data-series"] == evil


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([92.0, 99.5], 92, 100, ["92", "94", "96", "98", "100"]),
        ([0.013, 0.048], 0.01, 0.05, ["0.01", "0.02", "0.03", "0.04", "0.05"]),
        ([3.0], 2.4, 3.6, ["2.4", "2.6", "2.8", "3.0", "3.2", "3.4", "3.6"]),
        ([0.0, 2500.0], 0, 2500, ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
    ],
)
def test_linear_axis(values, low, high, ticks) -> None:
    axis = linear_axis(values)
    assert (axis.low, axis.high) == (pytest.approx(low), pytest.approx(high))
    assert [text for _, text in axis.ticks] == ticks


def test_axis_of_epochs() -> None:
    assert [text for _, text in count_axis([1, 6]).ticks] == ["1", "2", "3", "4", "5", "6"]
    assert [text for _, text in count_axis([1, 100]).ticks] == ["1", "20", "40", "60", "80", "100"]
    assert [text for _, text in count_axis([1, 103]).ticks][-2:] == ["80", "103"]
    one = count_axis([1, 1])
    assert one.share(1) == 0.5
    assert [text for _, text in one.ticks] == ["1"]


def test_axis_of_losses() -> None:
    assert loss_axis([0.1, 1.9]).low == 0
    assert not loss_axis([0.0, 100.0]).is_log
    assert loss_axis([2.0, 2.3]).low == pytest.approx(2.0)
    axis = loss_axis([0.03, 4.0])
    assert axis.is_log
    assert (axis.low, axis.high) == (pytest.approx(0.02), 5)
    many = log_axis([1e-6, 3.0])
    assert [text for _, text in many.ticks][:2] == ["1e-06", "1e-05"]


def test_nice_steps() -> None:
    assert [nice_step(w) for w in (1.5, 2.0, 3, 7, 0.04)] == [2, 2, 5, 10, pytest.approx(0.05)]


def test_spread_out_by_hand() -> None:
    assert spread_out([10, 12, 50], 15, 0, 100) == [10, 25, 50]
    assert spread_out([95, 99], 15, 0, 100) == [85, 100]
    assert spread_out([5, 5, 5], 80, 0, 100) == [0, 50, 100]
    assert spread_out([], 15, 0, 100) == []


def test_sixty_series_look_different() -> None:
    assert len({(look(style), swatch(style)) for style in range(60)}) == 60
    first = [re.search(r"c\d", look(style)).group() for style in range(8)]
    assert len(set(first)) == 8
