"""The page: what is shown of the groups, as plain values for the template, and the template filled.

Everything that comes from a run goes through the template's escaping. Nothing on the page is
fetched: the content security policy lets it show embedded pictures and run its one script, known by
its hash, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from locallearn._version import __version__
from locallearn.analysis.mean_std import MeanStd
from locallearn.analysis.report.charts import (
    SMALL,
    Axis,
    Series,
    count_axis,
    described,
    ends,
    line_chart,
    linear_axis,
    look,
    loss_axis,
    swatch,
)
from locallearn.analysis.report.collect import Figure, RecordedRun, RunCost
from locallearn.analysis.report.compare import (
    NONE,
    Group,
    environment_of,
    group_runs,
    mean_std,
    setting_text,
    settings_of,
)
from locallearn.engine.config import chosen_settings, data_name, train_command

# Curves: column of metrics.csv, title, digits behind the point.
_CURVES = (
    ("test_acc", "Test accuracy, %", 2),
    ("train_acc", "Train accuracy, %", 2),
    ("val_acc", "Validation accuracy, %", 2),
    ("test_loss", "Test loss", 4),
    ("train_loss", "Train loss", 4),
)
_MAX_TASKS_IN_SUMMARY = 4
# Settings in which runs must agree for their times, and their memory, to have a winner.
_SAME_FOR_TIME = ("batch_size", "precision", "compile", "device", "num_threads")
_SAME_FOR_MEMORY = ("batch_size", "precision")
_LONGEST_BLOCK_NAME = 11
_MAX_OPEN_CHARTS = 12
# Of a name below an axis, and of the axis; units of a chart's viewBox.
_CHARACTER, _AXIS_WIDTH = 8.0, 558.0


@dataclass(frozen=True)
class Cell:
    """A cell of the table of results: its text, and what it is sorted by."""

    text: str
    value: float | str | None = None
    is_best: bool = False


@dataclass(frozen=True)
class _Column:
    """A column of the table of results.

    Arguments:
        heading, unit: above it.
        cell: of a group's runs, one or several of them.
        is_number: to be aligned to the right.
    """

    heading: str
    unit: str
    cell: Callable[[Group], Cell]
    is_number: bool = True


def render_report(
    runs: Sequence[RecordedRun], title: str | None = None, *, now: datetime | None = None
) -> str:
    """A page of HTML that compares runs, and needs no other file.

    Arguments:
        runs: at least one; see :func:`locallearn.analysis.report.collect_runs`.
        title: of the page; what is compared where None.
        now: when it is made.
    """
    groups = group_runs(runs)
    files = resources.files(__package__)
    script = (files / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=BaseLoader(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    charts: dict[str, Any] = {}
    tasks = [_task(task, groups, charts) for task in dict.fromkeys(g.task for g in groups)]
    settings, versions = settings_of(groups), environment_of(groups)
    return template.render(
        title=title or _title(groups),
        facts=_facts(groups, now or datetime.now(UTC)),
        tiles=_tiles(groups),
        groups=groups,
        columns=_columns(groups),
        rows=_rows(groups),
        tasks=tasks,
        legend=_legend(groups),
        has_curves=any(task["curves"] for task in tasks),
        has_blocks=any(task["blocks"] for task in tasks),
        has_several_seeds=any(len(group.runs) > 1 for group in groups),
        has_unfinished=not all(group.is_finished for group in groups),
        is_of_closed_form=any("†" in _peak(group).text for group in groups),
        differing_settings=[p for p in settings if p.differs],
        equal_settings=[p for p in settings if not p.differs],
        differing_versions=[p for p in versions if p.differs],
        equal_versions=[p for p in versions if not p.differs],
        figures=[(run, [_embedded(f) for f in run.figures]) for run in runs if run.figures],
        commands=[(group, [(run, _command(run)) for run in group.runs]) for group in groups],
        charts=charts,
        swatch=swatch,
        setting_text=lambda name: name.replace("_", " "),
        style=Markup((files / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


# -- header -----------------------------------------------------------------------------------


def _title(groups: Sequence[Group]) -> str:
    tasks = list(dict.fromkeys(group.task for group in groups))
    rules = list(dict.fromkeys(group.first.config.settings.rule for group in groups))
    what = tasks[0] if len(tasks) == 1 else f"{len(tasks)} pairs of data and model"
    which = ", ".join(rules) if len(rules) <= 6 else f"{len(rules)} rules"
    return f"{which} on {what}"


def _facts(groups: Sequence[Group], now: datetime) -> list[tuple[str, str]]:
    """What the page is about: pairs of heading and text."""
    runs = [run for group in groups for run in group.runs]
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    if len(groups) < len(runs):
        several = sum(len(group.runs) > 1 for group in groups)
        count += f"; {several} group{'s' * (several > 1)} of runs that differ in the seed alone"
    unfinished = sum(not run.is_finished for run in runs)
    if unfinished:
        count += f"; {unfinished} not finished"
    environments = [run.config.environment for run in runs]

    def of(value: Callable[[dict[str, Any]], Any]) -> str:
        distinct = list(dict.fromkeys(str(value(each)) for each in environments))
        return ", ".join(distinct) if len(distinct) <= 3 else f"{len(distinct)} different ones"

    started = sorted(str(each.get("created", "")) for each in environments)
    when = _minute(started[0])
    if _minute(started[-1]) != when:
        when += f" to {_minute(started[-1])}"
    return [
        ("runs", count),
        ("started", when or NONE),
        ("device", of(lambda e: f"{e['device_name']} ({e.get('device', NONE)})")),
        ("versions", of(lambda e: f"locallearn {e.get('locallearn')}, torch {_torch(e)}")),
        ("report", f"{_minute(now.isoformat())}, by locallearn {__version__}"),
    ]


def _torch(environment: dict[str, Any]) -> str:
    return str(environment["packages"].get("torch", NONE))


def _minute(time: str) -> str:
    """ "2026-11-21T10:03:59+00:00" as "2026-11-21 10:03 UTC"."""
    return f"{time[:10]} {time[11:16]} UTC" if len(time) >= 16 else time


@dataclass(frozen=True)
class _Tile:
    """A figure of the summary: what it is, of which group, and what comes next."""

    heading: str
    value: str
    unit: str
    of: Group
    note: str


def _tiles(groups: Sequence[Group]) -> list[_Tile]:
    """The best of what can be compared: accuracy by task, and costs where there is one task."""
    finished = [group for group in groups if group.is_finished]
    tasks = list(dict.fromkeys(group.task for group in groups))
    tiles = []
    for task in tasks if len(tasks) <= _MAX_TASKS_IN_SUMMARY else []:
        heading = "highest test accuracy" + (f": {task}" if len(tasks) > 1 else "")
        tile = _best(heading, "%", finished, task, _accuracy_of, "{:.2f}".format, highest=True)
        tiles += [tile] if tile else []
    if len(tasks) > 1:
        return tiles
    runs = [run for group in groups for run in group.runs]
    timed, held = (
        len({tuple(getattr(run.config.settings, name) for name in names) for run in runs}) == 1
        for names in (_SAME_FOR_TIME, _SAME_FOR_MEMORY)
    )
    timed = timed and len({run.config.environment["device_name"] for run in runs}) == 1
    # What was measured and what was counted are no match either.
    held = held and len({group.first.measured_peak_mib is None for group in groups}) == 1
    for heading, unit, value, form, is_fair in (
        ("shortest step", "ms", _step_time_of, "{:.1f}".format, timed),
        ("fewest learning-signal MACs", "an image", _signal_of, _count_text, True),
        ("least activation memory", "MiB", _peak_of, _short, held),
    ):
        tile = _best(heading, unit, groups, tasks[0], value, form) if is_fair else None
        tiles += [tile] if tile else []
    return tiles


def _best(
    heading: str,
    unit: str,
    groups: Sequence[Group],
    task: str,
    value: Callable[[Group], MeanStd | None],
    form: Callable[[float], str],
    *,
    highest: bool = False,
) -> _Tile | None:
    """The best group of a task, with the next one; what a group has that is the only one.

    None where there is nothing to compare it with, no difference, or nothing at all.
    """
    known = [(each, group) for group in groups if group.task == task and (each := value(group))]
    known.sort(key=lambda pair: pair[0].mean, reverse=highest)
    if not known or (len(known) == 1 and len(groups) > 1):
        return None
    best, group = known[0]
    notes = []
    if len(known) == 1:
        heading = heading.partition(" ")[2]
    else:
        worse = [(each, other) for each, other in known if each.mean != best.mean]
        if not worse:
            return None
        num_equal = len(known) - len(worse) - 1
        notes += [f"and {num_equal} more"] if num_equal else []
        notes.append(f"next: {worse[0][1].label}, {_with_std(worse[0][0], form)}")
    note = "; ".join(notes)
    return _Tile(heading, _with_std(best, form), unit, group, note)


# -- table ------------------------------------------------------------------------------------


def _accuracy_of(group: Group) -> MeanStd | None:
    return group.last("test_acc")


def _step_time_of(group: Group) -> MeanStd | None:
    return group.over(lambda run: _median(run, "step_time_ms"))


def _signal_of(group: Group) -> MeanStd | None:
    """Counted, and so the same for every seed."""
    return mean_std([group.first.cost.learning_signal_macs])


def _peak_of(group: Group) -> MeanStd | None:
    """Measured; or else counted, of the groups whose count is that of what they did."""
    cost, measured = group.first.cost, group.first.measured_peak_mib
    if measured is None and cost.is_of_closed_form:
        return None
    return mean_std([cost.peak_activation_mib if measured is None else measured])


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _median(run: RecordedRun, column: str) -> float | None:
    values = [value for value in run.metrics.columns.get(column, ()) if value is not None]
    return statistics.median(values) if values else None


def _with_std(value: MeanStd | None, form: Callable[[float], str]) -> str:
    if value is None:
        return NONE
    return form(value.mean) if value.std is None else f"{form(value.mean)} ± {form(value.std)}"


def _columns(groups: Sequence[Group]) -> list[_Column]:
    """Those of the table of results, behind the name."""

    def setting(heading: str, name: str, unit: str = "") -> _Column:
        return _Column(heading, unit, lambda g: _plain(_setting(g, name)), is_number=False)

    def figure(heading: str, unit: str, form: str, value: Callable[[RecordedRun], Any]) -> _Column:
        def cell(group: Group) -> Cell:
            found = group.over(value)
            return Cell(_with_std(found, form.format), None if found is None else found.mean)

        return _Column(heading, unit, cell)

    def counted(heading: str, unit: str, form: str, value: Callable[[RunCost], Any]) -> _Column:
        def cell(group: Group) -> Cell:
            count = value(group.first.cost)
            return Cell(NONE if count is None else form.format(count), count)

        return _Column(heading, unit, cell)

    best = {
        task: max(values)
        for task in dict.fromkeys(group.task for group in groups)
        if len(values := _finished_accuracies(groups, task)) > 1
    }

    def accuracy(group: Group) -> Cell:
        found = group.last("test_acc")
        mean = None if found is None else found.mean
        is_best = group.is_finished and mean is not None and mean == best.get(group.task)
        return Cell(_with_std(found, "{:.2f}".format), mean, is_best)

    validation = figure("validation accuracy", "%", "{:.2f}", lambda run: run.last("val_acc"))
    has_validation = any("val_acc" in run.metrics.columns for group in groups for run in group.runs)
    return [
        _Column("test accuracy", "last epoch, %", accuracy),
        figure("best", "on the way, %", "{:.2f}", _best_on_the_way),
        figure("train accuracy", "%", "{:.2f}", lambda run: run.last("train_acc")),
        *([validation] if has_validation else []),
        figure("step time", "ms", "{:.1f}", lambda run: _median(run, "step_time_ms")),
        figure("images", "a second", "{:,.0f}", lambda run: _median(run, "images_per_second")),
        counted(
            "signal MACs", "M an image", "{:,.3f}", lambda c: _millions(c.learning_signal_macs)
        ),
        counted("step MACs", "M an image", "{:,.1f}", lambda c: _millions(c.total_macs)),
        _Column("memory", "peak, MiB", _peak),
        counted("parameters", "", "{:,}", lambda c: c.num_params),
        counted("rule's own", "parameters", "{:,}", lambda c: c.num_additional_params),
        _Column("dataset", "", lambda g: _plain(_data(g)), is_number=False),
        setting("model", "model"),
        setting("rule", "rule"),
        _Column("options", "of the rule", lambda g: _plain(_options(g)), is_number=False),
        _Column("epochs", "", _epochs),
        _Column("seed", "", _seeds),
        setting("precision", "precision"),
        setting("backend", "backend"),
        setting("device", "device"),
    ]


def _finished_accuracies(groups: Sequence[Group], task: str) -> list[float]:
    ours = (g for g in groups if g.task == task and g.is_finished)
    return [found.mean for group in ours if (found := group.last("test_acc"))]


def _rows(
    groups: Sequence[Group],
) -> list[tuple[Group, list[Cell], list[tuple[RecordedRun, list[Cell]]]]]:
    """Each group's cells, and, where it has several runs, those of each run."""
    columns = _columns(groups)
    rows = []
    for group in groups:
        alone = [Group((run,), group.label, group.task, group.style) for run in group.runs]
        of_runs = [
            (each.first, [_unmarked(column.cell(each)) for column in columns]) for each in alone
        ]
        cells = [column.cell(group) for column in columns]
        rows.append((group, cells, of_runs if len(alone) > 1 else []))
    return rows


def _unmarked(cell: Cell) -> Cell:
    return Cell(cell.text, cell.value)


def _plain(text: str) -> Cell:
    return Cell(text, text)


def _setting(group: Group, name: str) -> str:
    return str(getattr(group.first.config.settings, name))


def _data(group: Group) -> str:
    settings = group.first.config.settings
    name = data_name(settings)
    return name if name == settings.dataset else f"{name} ({settings.dataset})"


def _options(group: Group) -> str:
    """The rule's basis, and its other options that are not the defaults."""
    settings = group.first.config.settings
    names = {*settings.build_rule().options(), "group_blocks", "head_after_pool"} - {"basis"}
    chosen = {n: v for n, v in chosen_settings(settings).items() if n in names}
    words = [f"{settings.basis} basis"] if settings.basis else []
    words += [setting_text(name, value) for name, value in chosen.items()]
    return ", ".join(words) or NONE


def _epochs(group: Group) -> Cell:
    planned = group.first.config.settings.epochs
    if group.is_finished:
        return Cell(str(planned), planned)
    return Cell(f"{group.num_epochs} of {planned}", group.num_epochs)


def _seeds(group: Group) -> Cell:
    seeds = [run.config.settings.seed for run in group.runs]
    return Cell(_ranges(seeds), seeds[0])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of three and more in short: "0-4, 7" with a dash."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = []
    for part in parts:
        texts += [f"{part[0]}\N{EN DASH}{part[-1]}"] if len(part) > 2 else [str(n) for n in part]
    return ", ".join(texts)


def _best_on_the_way(run: RecordedRun) -> float | None:
    return max((v for v in run.metrics.columns.get("test_acc", ()) if v is not None), default=None)


def _peak(group: Group) -> Cell:
    cost, measured = group.first.cost, group.first.measured_peak_mib
    if measured is not None:
        return Cell(f"{_short(measured)} measured", measured)
    peak = cost.peak_activation_mib
    if peak is None:
        return Cell(NONE)
    return Cell(f"{_short(peak)}{'†' * cost.is_of_closed_form} counted", peak)


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- charts -----------------------------------------------------------------------------------


def _legend(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """Label and style of each look there is."""
    return list({group.label: group.style for group in groups if group.num_epochs}.items())


def _task(task: str, groups: Sequence[Group], charts: dict[str, Any]) -> dict[str, Any]:
    """What is drawn of one task; the values go into ``charts`` by the charts' names."""
    ours = [group for group in groups if group.task == task]
    number = len({name.split("-")[0] for name in charts})
    prefix = f"t{number}"
    curves = []
    for column, title, digits in _CURVES:
        drawn = [_curve(group, column) for group in ours]
        drawn = [series for series in drawn if series.points()]
        if drawn:
            curves.append(_both(drawn, f"{prefix}-{column}", title, digits, charts, ours))
    blocks = _blocks(ours, prefix, charts)
    return {
        "name": task,
        "curves": curves,
        "by_depth": _by_depth(ours, f"{prefix}-depth", charts),
        "blocks": blocks[:_MAX_OPEN_CHARTS],
        "more_blocks": blocks[_MAX_OPEN_CHARTS:],
        "costs": _costs(ours),
    }


def _curve(group: Group, column: str) -> Series:
    found = group.curve(column)
    epochs = [float(n) for n in range(1, len(found) + 1)]
    return _series(group, epochs, found)


def _series(group: Group, x: Sequence[float], found: Sequence[MeanStd | None]) -> Series:
    means = [None if each is None else each.mean for each in found]
    spread = [None if each is None else each.std for each in found]
    return Series(group.label, group.style, x, means, spread if any(spread) else ())


def _both(
    drawn: Sequence[Series],
    name: str,
    title: str,
    digits: int,
    charts: dict[str, Any],
    groups: Sequence[Group],
) -> tuple[str, Markup, Markup | None]:
    """A title, a chart over epochs, and the same over seconds of training."""
    values = ends(drawn)
    if digits == 2:
        y_axis = _percent_axis(values)
    else:
        # A band may reach below zero, where no loss and no logarithm is.
        y_axis = loss_axis([y for each in drawn for _, _, y in each.points()])
        title += ", logarithmic" * y_axis.is_log
    text = described(title, drawn, digits)
    epochs = [x for each in drawn for _, x, _ in each.points()]
    chart = line_chart(
        drawn,
        name=name,
        description=f"{text} Over epochs.",
        x_axis=count_axis(epochs),
        y_axis=y_axis,
        x_title="epoch",
    )
    charts[name] = _values(drawn, "epoch", digits)
    seconds = {group.label: group.seconds() for group in groups}
    timed = [
        Series(each.label, each.style, seconds[each.label], each.y, each.spread) for each in drawn
    ]
    times = [x for each in timed for _, x, _ in each.points()]
    if not times:
        return title, chart, None
    charts[f"{name}-s"] = _values(timed, "seconds", digits)
    over_time = line_chart(
        timed,
        name=f"{name}-s",
        description=f"{text} Over seconds of training.",
        x_axis=linear_axis([0.0, max(times)]),
        y_axis=y_axis,
        x_title="seconds of training",
    )
    return title, chart, over_time


def _percent_axis(values: Sequence[float]) -> Axis:
    return linear_axis([min(max(value, 0.0), 100.0) for value in values])


def _values(
    drawn: Sequence[Series], unit: str, digits: int, names: Sequence[str] = ()
) -> dict[str, Any]:
    """A chart's values for the script that shows them under the pointer."""

    def rounded(values: Sequence[float | None]) -> list[float | None]:
        return [None if v is None else round(v, digits) for v in values]

    return {
        "unit": unit,
        "digits": digits,
        "names": list(names),
        "series": [
            {
                "label": each.label,
                "look": "shade" if each.shade is not None else look(each.style),
                "shade": each.shade,
                "x": rounded(each.x),
                "y": rounded(each.y),
                "std": rounded(each.spread),
            }
            for each in drawn
        ],
    }


def _by_depth(
    groups: Sequence[Group], name: str, charts: dict[str, Any]
) -> list[tuple[str, Markup]]:
    """The blocks' accuracies in the last epoch, and the output's, by depth: a chart for each
    sequence of blocks."""
    charts_by_blocks: list[tuple[str, Markup]] = []
    sequences = dict.fromkeys(b for group in groups if (b := group.first.metrics.blocks()))
    for number, blocks in enumerate(sequences):
        drawn = []
        for group in groups:
            if group.first.metrics.blocks() == blocks and group.num_epochs:
                columns = [f"{block}_acc" for block in blocks] + ["train_acc"]
                last = [group.curve(column)[-1] for column in columns]
                drawn.append(_series(group, [float(i) for i in range(1, len(last) + 1)], last))
        if not drawn:
            continue
        names = [_shortened(block) for block in blocks] + ["output"]
        key = f"{name}{number}"
        charts[key] = _values(drawn, "block", 2, names)
        title = "Blocks' own accuracy, %"
        axis = Axis(0.6, len(names) + 0.4, tuple(enumerate(_not_too_many(names), start=1)))
        chart = line_chart(
            drawn,
            name=key,
            description=described(f"{title}, by depth, in the last epoch", drawn, 2),
            x_axis=axis,
            y_axis=_percent_axis(ends(drawn)),
            x_title="block, from the input to the output",
        )
        charts_by_blocks.append((title, chart))
    return charts_by_blocks


def _not_too_many(names: Sequence[str]) -> list[str]:
    """The names of an axis: all that have room; or else every k-th, and the last."""
    longest = max(len(name) for name in names) * _CHARACTER + 2 * _CHARACTER
    stride = math.ceil(len(names) * longest / _AXIS_WIDTH)
    last = len(names) - 1
    return [
        name if i == last or (i % stride == 0 and last - i >= stride) else ""
        for i, name in enumerate(names)
    ]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_BLOCK_NAME else "…" + name[-_LONGEST_BLOCK_NAME + 1 :]


def _blocks(
    groups: Sequence[Group], prefix: str, charts: dict[str, Any]
) -> list[tuple[Group, Markup]]:
    """For each group its blocks' accuracies over epochs."""
    result = []
    ours = [group for group in groups if group.first.metrics.blocks() and group.num_epochs]
    everything = [
        y
        for group in ours
        for block in group.first.metrics.blocks()
        for _, _, y in _curve(group, f"{block}_acc").points()
    ]
    for number, group in enumerate(ours):
        blocks = group.first.metrics.blocks()
        drawn = []
        for depth, block in enumerate(blocks):
            curve = _curve(group, f"{block}_acc")
            shade = depth / max(1, len(blocks) - 1)
            drawn.append(Series(_shortened(block), 0, curve.x, curve.y, shade=shade))
        key = f"{prefix}-block{number}"
        charts[key] = _values(drawn, "epoch", 2)
        chart = line_chart(
            drawn,
            name=key,
            description=described(f"Accuracy of each block of {group.label}, %", drawn, 2),
            x_axis=count_axis([x for each in drawn for _, x, _ in each.points()]),
            y_axis=_percent_axis(everything),
            x_title="epoch",
            size=SMALL,
            names_at_ends=True,
        )
        result.append((group, chart))
    return result


# -- costs ------------------------------------------------------------------------------------


def _costs(groups: Sequence[Group]) -> dict[str, Any]:
    """Rows of bars: places and widths in percent."""
    counted = [group for group in groups if group.first.cost.total_macs]
    totals = [group.first.cost.total_macs or 0 for group in counted]
    signals = [group.first.cost.learning_signal_macs or 0 for group in counted]
    positive = [count for count in totals + signals if count]
    macs: list[dict[str, Any]] = []
    ticks: list[tuple[float, str]] = []
    if positive:
        low = math.floor(math.log10(min(positive)))
        high = max(math.ceil(math.log10(max(positive))), low + 1)

        def place(count: int) -> float:
            return 100 * (math.log10(count) - low) / (high - low)

        stride = math.ceil((high - low) / 5)
        powers = range(low, high + 1, stride)
        ticks = [(100 * (p - low) / (high - low), _count_text(10**p)) for p in powers]
        for group, signal, total in zip(counted, signals, totals, strict=True):
            macs.append(
                {
                    "group": group,
                    "signal": place(signal) if signal else None,
                    "total": place(total),
                    "text": f"{_count_text(signal)} of {_count_text(total)}",
                    "share": f"{100 * signal / total:.2g} %",
                }
            )
    memory = [(g, c.value, c.text) for g in groups if isinstance((c := _peak(g)).value, float)]
    times = [(g, t) for g in groups if (t := _step_time_of(g)) is not None]
    return {
        "macs": macs,
        "ticks": ticks,
        "memory": _bars(memory),
        "times": _bars([(g, t.mean, _with_std(t, "{:.1f}".format)) for g, t in times]),
    }


def _bars(values: Sequence[tuple[Group, float, str]]) -> list[tuple[Group, float, str]]:
    """Group, width in percent of the longest, text."""
    longest = max((value for _, value, _ in values), default=0.0) or 1.0
    return [(group, 100 * value / longest, text) for group, value, text in values]


def _count_text(count: float) -> str:
    """1234567 as "1.23 M"."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:g}"


def _command(run: RecordedRun) -> str:
    """Without the directory of decoded images, which changes nothing and is its machine's own."""
    return train_command(replace(run.config.settings, cache=None))


def _embedded(figure: Figure) -> tuple[Figure, str]:
    """The figure with the data URI that holds it."""
    content = base64.b64encode(figure.content).decode()
    return figure, f"data:{figure.media_type};base64,{content}"
