"""Run directories as they lie on disk, read into plain values."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from locallearn.analysis.cost import run_cost
from locallearn.analysis.measured import read_peak_mib
from locallearn.engine import Metrics, RunConfig, RunDirectory
from locallearn.engine.run import FORMAT, Column
from locallearn.errors import UserError
from locallearn.rules import Backprop, ErrorRule, Pepita

_FIGURE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Figure:
    """A picture in a run's `figures/`.

    Arguments:
        name: of the file, without its suffix.
        media_type: of the content.
        content: the file's.
        caption: of NAME.json beside it; the file's name where there is none.
        command: that made it; "" where that is not recorded.
    """

    name: str
    media_type: str
    content: bytes
    caption: str
    command: str


@dataclass(frozen=True)
class RunCost:
    """What a step of a run costs, counted (`analysis.run_cost`); None where it is not.

    Arguments:
        learning_signal_macs, total_macs: for each image.
        peak_activation_mib: of a batch.
        num_params: of the network; of one from elsewhere what its finished run says.
        num_additional_params: what the rule trains besides.
        is_of_closed_form: whether the memory is that of the closed form although the run's blocks
            were updated under autograd, which holds more.
    """

    learning_signal_macs: int | None
    total_macs: int | None
    peak_activation_mib: float | None
    num_params: int | None
    num_additional_params: int | None
    is_of_closed_form: bool


@dataclass(frozen=True)
class RecordedRun:
    """One run.

    Arguments:
        path: its directory.
        name: what tells it from the others, a part of its path.
        config: what config.json holds.
        metrics: what metrics.csv holds.
        summary: what summary.json holds; None of a run that is not finished.
        cost: of its step.
        measured_peak_mib: of its step, as `peak_activation_mib` of the cost; None where it was not
            measured.
        figures: that were made of it.
    """

    path: Path
    name: str
    config: RunConfig
    metrics: Metrics
    summary: dict[str, Any] | None
    cost: RunCost
    measured_peak_mib: float | None
    figures: tuple[Figure, ...]

    @property
    def num_epochs(self) -> int:
        """Recorded ones."""
        return self.metrics.num_epochs

    @property
    def is_finished(self) -> bool:
        return self.summary is not None

    def last(self, column: str) -> float | None:
        """The value after the last epoch; None where there is none."""
        if self.summary is not None and isinstance(self.summary.get(column), float):
            return float(self.summary[column])
        values = self.metrics.columns.get(column, ())
        return values[-1] if values else None

    def seconds(self) -> Column:
        """Of training, up to the end of each epoch: the sum of images / (images a second)."""
        num_images = self.config.data.get("num_train", 0)
        if num_images % self.config.settings.batch_size == 1:
            num_images -= 1  # a last batch of one image is left out
        total: float | None = 0.0
        sums = []
        for rate in self.metrics.columns.get("images_per_second", ()):
            total = None if total is None or not rate else total + num_images / rate
            sums.append(total)
        return tuple(sums)


def collect_runs(
    paths: Sequence[Path], on_foreign: Callable[[Path], None] | None = None
) -> list[RecordedRun]:
    """The runs in these directories and below them, each once, in the order given.

    Arguments:
        paths: directories, of runs or above them.
        on_foreign: is told of each config.json below them that locallearn did not write; what is
            beside it is passed over.

    Raises:
        UserError: a path that is no directory or holds no run, or a run that can't be read.
        OSError: as the file system says.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for path in paths:
        for directory in _find(path, on_foreign or (lambda _: None)):
            below = directory.relative_to(path).as_posix()
            name = below if below != "." else path.resolve().name
            found.setdefault(directory.resolve(), (directory, name))
    names = _told_apart([(path, name) for path, (_, name) in found.items()])
    costs: dict[str, RunCost] = {}
    return [
        _read(directory, name, costs)
        for (directory, _), name in zip(found.values(), names, strict=True)
    ]


def _find(path: Path, on_foreign: Callable[[Path], None]) -> list[Path]:
    """The directory itself, if it is a run's, or those of the runs below it, in order."""
    if not path.is_dir():
        raise UserError(
            f"{path} is no directory; expected a run directory, or one with runs in it."
        )
    if (path / "config.json").is_file():
        return [path]

    def stop(error: OSError) -> NoReturn:
        raise error

    found = []
    for folder, below, _ in os.walk(path, onerror=stop):
        below.sort()
        # A link may lead anywhere: it is followed to a run, and not searched.
        links = [Path(folder, name) for name in below if Path(folder, name).is_symlink()]
        for place in (Path(folder), *links):
            config = place / "config.json"
            if not config.is_file():
                continue
            if not _is_run(config):
                on_foreign(config)
                continue
            found.append(place)
            if place == Path(folder):
                below.clear()
                break
    if not found:
        raise UserError(
            f"{path} holds no run, and no directory below it does (a run has a config.json that "
            f"`locallearn train` wrote). Give run directories."
        )
    return sorted(found)


def _is_run(config: Path) -> bool:
    """Whether locallearn wrote it: others name their files so, too. Raises UserError where it did,
    and the file is broken."""
    content = config.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        if f'"{FORMAT}"'.encode() in content:
            raise UserError(f"{config} is no valid JSON ({error}).") from error
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _told_apart(named: Iterable[tuple[Path, str]]) -> list[str]:
    """The names, with as many of the directories above before them as make each its own."""
    pairs = list(named)
    names = [name for _, name in pairs]
    depth = 0
    while max(Counter(names).values()) > 1:
        depth += 1
        twice = {name for name, count in Counter(names).items() if count > 1}
        for i, (path, name) in enumerate(pairs):
            if names[i] in twice:
                num_own = len(Path(name).parts)
                names[i] = Path(*path.parts[-(num_own + depth) :]).as_posix()
    return names


def _read(directory: Path, name: str, costs: dict[str, RunCost]) -> RecordedRun:
    run = RunDirectory(directory)
    config, summary = run.read_config(), run.read_summary()
    # Runs that differ in what costs nothing are counted once.
    same = replace(config.settings, seed=0, epochs=1, lr=1.0, data_dir=None, cache=None)
    key = f"{same} {config.inputs} {len(config.class_names)} {summary is None}"
    if key not in costs:
        costs[key] = _cost(config, summary or {})
    return RecordedRun(
        path=directory,
        name=name,
        config=config,
        metrics=run.read_metrics(),
        summary=summary,
        cost=costs[key],
        measured_peak_mib=read_peak_mib(directory.resolve()),
        figures=_read_figures(directory / "figures"),
    )


def _read_figures(folder: Path) -> tuple[Figure, ...]:
    """Of each name the SVG, or else the PNG."""
    if not folder.is_dir():
        return ()
    chosen: dict[str, Path] = {}
    for suffix in _FIGURE_TYPES:
        for path in sorted(folder.glob(f"*{suffix}")):
            chosen.setdefault(path.stem, path)
    figures = []
    for name, path in sorted(chosen.items()):
        caption, command = _caption(path.with_suffix(".json"))
        kind = _FIGURE_TYPES[path.suffix]
        figures.append(Figure(name, kind, path.read_bytes(), caption or path.name, command))
    return tuple(figures)


def _caption(path: Path) -> tuple[str, str]:
    """Caption and command; empty where the file beside the figure is missing or another's."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", ""
    if not isinstance(value, dict):
        return "", ""
    texts = (value.get("caption"), value.get("command"))
    caption, command = (text if isinstance(text, str) else "" for text in texts)
    return caption, command


def _cost(config: RunConfig, summary: dict[str, Any]) -> RunCost:
    settings = config.settings
    cost = run_cost(config)
    if cost is None:
        return RunCost(
            None,
            None,
            None,
            summary.get("num_params"),
            summary.get("num_additional_params"),
            is_of_closed_form=False,
        )
    if settings.group_blocks > 1:  # backpropagation goes on within each: not counted
        return RunCost(None, None, None, cost.num_params, None, is_of_closed_form=False)
    rule, style = settings.build_rule(), settings.block_style()
    peak = cost.peak_activation_mib
    # What is counted is what PyTorch makes on the CPU of blocks with BatchNorm and (Leaky)ReLU and
    # of heads before the max-pool; and of backpropagation without the masks of dropout.
    is_usual = (
        settings.device == "cpu"
        and not settings.compile
        and not settings.head_after_pool
        and style.norm == "batch"
        and style.activation != "tanh"
        and not (settings.dropout and isinstance(rule, Backprop))
    )
    if not is_usual:
        peak = None
    is_local = not isinstance(rule, Backprop | ErrorRule | Pepita)
    is_of_closed_form = is_local and peak is not None and settings.backend == "autograd"
    return RunCost(
        cost.learning_signal_macs,
        cost.total_macs,
        peak,
        cost.num_params,
        cost.num_additional_params,
        is_of_closed_form,
    )
