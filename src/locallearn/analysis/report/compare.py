"""Runs grouped by what they share: seeds into means, settings into what differs."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from locallearn.analysis.mean_std import MeanStd
from locallearn.analysis.report.collect import RecordedRun
from locallearn.engine.config import chosen_settings, data_name, model_name

# Stands where there is nothing.
NONE = "\N{EN DASH}"
# Where a run's files lie changes nothing that it computes; folder's data is told by its content.
_PLACES = ("data_dir", "cache")
_COMMIT_DIGITS = 12
_DIGEST_DIGITS = 12  # of a sha256
# What a label never says; and what only where it would be another's.
_NOT_IN_LABELS = ("seed", *_PLACES)
_MACHINE = ("device", "backend", "num_threads")


def mean_std(values: Iterable[float | None]) -> MeanStd | None:
    """Of the values that are there; None where there are none."""
    known = [value for value in values if value is not None]
    return MeanStd.of(known) if known else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, each with another one.

    Arguments:
        runs: at least one.
        label: what tells it from the other groups of its task.
        task: what it learns: a network, classes and test images. Equal for no others.
        style: number of its colour; that of every group with this label.
    """

    runs: tuple[RecordedRun, ...]
    label: str
    task: str
    style: int

    @property
    def first(self) -> RecordedRun:
        return self.runs[0]

    @property
    def is_finished(self) -> bool:
        """An unfinished run is in no group with others."""
        return self.first.is_finished

    @property
    def num_epochs(self) -> int:
        """Recorded of every run."""
        return min(run.num_epochs for run in self.runs)

    def over(self, value: Callable[[RecordedRun], float | None]) -> MeanStd | None:
        """The statistic of a value over the runs."""
        return mean_std(value(run) for run in self.runs)

    def last(self, column: str) -> MeanStd | None:
        return self.over(lambda run: run.last(column))

    def curve(self, column: str) -> list[MeanStd | None]:
        """An epoch's statistic over the runs, for each epoch that all have."""
        columns = [run.metrics.columns for run in self.runs]
        known = [each[column][: self.num_epochs] for each in columns if column in each]
        return [mean_std(values) for values in zip(*known, strict=True)]

    def seconds(self) -> list[float | None]:
        """Of training up to the end of each epoch, mean over the runs."""
        sums = (mean_std(at) for at in zip(*(run.seconds() for run in self.runs), strict=False))
        return [None if each is None else each.mean for each in sums]


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """The runs in groups, in the order of their first ones; those of one task together."""
    members: list[tuple[str, list[RecordedRun]]] = []
    for run in runs:
        key = _key(run)
        seed = run.config.settings.seed
        for other, group in members:
            taken = {each.config.settings.seed for each in group}
            if run.is_finished and other == key and seed not in taken:
                group.append(run)
                break
        else:
            members.append((key, [run]))
    groups = [group for _, group in members]
    tasks = _tasks([group[0] for group in groups])
    labels = _labels(groups, tasks)
    styles = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    made = [
        Group(tuple(sorted(group, key=_seed)), label, task, styles[label])
        for group, label, task in zip(groups, labels, tasks, strict=True)
    ]
    order = list(dict.fromkeys(tasks))
    return sorted(made, key=lambda group: order.index(group.task))


def _seed(run: RecordedRun) -> int:
    return run.config.settings.seed


def _key(run: RecordedRun) -> str:
    """The same for runs that differ in nothing but the seed."""
    config = run.config
    settings = config.settings.to_json()
    for name in ("seed", *_PLACES):
        del settings[name]
    # What is held out for validation is the seed's.
    data = [_test_images(run)] if config.settings.val_split else _parts(run)
    return repr((settings, data, config.class_names, run.is_finished))


def _tasks(runs: Sequence[RecordedRun]) -> list[str]:
    """What each learns: data and network; and where others of that name have other models' files,
    classes or test images, what differs. Data that was moved keeps its first name."""
    data = [
        (run.config.settings.dataset, run.config.class_names, _num_test(run), _test_images(run))
        for run in runs
    ]
    first: dict[Any, str] = {}
    for run, key in zip(runs, data, strict=True):
        first.setdefault(key, data_name(run.config.settings))
    names = [
        f"{first[key]}, {model_name(run.config.settings)}"
        for run, key in zip(runs, data, strict=True)
    ]
    together = [""] * len(runs)
    for words in (
        [run.config.settings.model for run in runs],
        [f"model's file {_digest(run)}" for run in runs],
        [f"{len(run.config.class_names)} classes" for run in runs],
        [f"{_num_test(run):,} test images" for run in runs],
        [f"test data {_test_images(run)}" for run in runs],
        [f"class names {zlib.crc32(repr(run.config.class_names).encode()):08x}" for run in runs],
    ):
        names = _told_apart(names, words, together)
    return names


def _digest(run: RecordedRun) -> str:
    return str(run.config.settings.model_digest)[:_DIGEST_DIGITS]


def _num_test(run: RecordedRun) -> int:
    return int(run.config.data.get("num_test", 0))


def _parts(run: RecordedRun) -> list[str]:
    """Fingerprints of the images to train on, to test on, and of those held out, if any."""
    return str(run.config.data["fingerprint"]).split("-")


def _test_images(run: RecordedRun) -> str:
    return "".join(_parts(run)[1:2])


def _told_apart(names: Sequence[str], words: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The names; with the words behind those that are equal in a task although the words differ."""
    said: dict[tuple[str, str], set[str]] = {}
    for task, name, word in zip(tasks, names, words, strict=True):
        said.setdefault((task, name), set()).add(word)
    return [
        f"{name}, {word}" if len(said[task, name]) > 1 else name
        for task, name, word in zip(tasks, names, words, strict=True)
    ]


def _labels(groups: Sequence[Sequence[RecordedRun]], tasks: Sequence[str]) -> list[str]:
    """The rule of each, with those of its chosen settings in which groups differ.

    Where that leaves several of a task alike, device, backend and threads if those differ; where
    that does, too, the name of the first run.
    """
    settings = [group[0].config.settings for group in groups]
    unsaid = (*_NOT_IN_LABELS, *_MACHINE)
    chosen = [
        {name: value for name, value in chosen_settings(each).items() if name not in unsaid}
        for each in settings
    ]
    labels = []
    for each, own in zip(settings, chosen, strict=True):
        words = [
            setting_text(name, value)
            for name, value in own.items()
            if any(name not in other or other[name] != value for other in chosen)
        ]
        labels.append(", ".join([each.rule, *words]))
    for name in _MACHINE:
        words = [setting_text(name, getattr(each, name)) for each in settings]
        labels = _told_apart(labels, words, tasks)
    counts = Counter(zip(tasks, labels, strict=True))
    return [
        label if counts[task, label] == 1 else f"{label} ({group[0].name})"
        for group, task, label in zip(groups, tasks, labels, strict=True)
    ]


def setting_text(name: str, value: Any) -> str:
    """A setting in a few words: "basis cosine", "no cuda graph"."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


@dataclass(frozen=True)
class Property:
    """What a setting, or a version, is in each group: texts, one for each group."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def settings_of(groups: Sequence[Group]) -> list[Property]:
    """Every setting, and the facts of the data, by group."""
    rows = [_settings(run.config.settings.to_json()) for run in _firsts(groups)]
    properties = [
        Property(name, tuple(row[name] for row in rows)) for name in rows[0] if name != "seed"
    ]
    seeds = tuple(_distinct(str(_seed(run)) for run in group.runs) for group in groups)
    facts = {
        "training images": "num_train",
        "validation images": "num_val",
        "test images": "num_test",
        "augmentation does": "augmentation",
    }
    data = [
        Property(text, tuple(_text(run.config.data.get(name)) for run in _firsts(groups)))
        for text, name in facts.items()
    ]
    sizes = tuple(
        "x".join(str(n) for n in (run.config.inputs.num_channels, *run.config.inputs.image_size))
        for run in _firsts(groups)
    )
    classes = tuple(str(len(run.config.class_names)) for run in _firsts(groups))
    inputs = [Property("image", sizes), Property("classes", classes)]
    return [*properties, Property("seed", seeds), *data, *inputs]


def environment_of(groups: Sequence[Group]) -> list[Property]:
    """Versions, device and commit by group; every distinct value where its runs have several."""
    tables = [[_environment(run.config.environment) for run in group.runs] for group in groups]
    names = dict.fromkeys(name for rows in tables for row in rows for name in row)
    return [
        Property(name, tuple(_distinct(row.get(name, NONE) for row in rows) for rows in tables))
        for name in names
    ]


def _firsts(groups: Sequence[Group]) -> list[RecordedRun]:
    return [group.first for group in groups]


def _settings(values: dict[str, Any]) -> dict[str, str]:
    texts = {name: _text(value) for name, value in values.items()}
    return texts | {"model_digest": texts["model_digest"][:_DIGEST_DIGITS]}


def _environment(values: dict[str, Any]) -> dict[str, str]:
    """Flat: packages by their own names, and without the time, which always differs."""
    flat = {name: value for name, value in values.items() if name not in ("packages", "created")}
    if flat.get("git_commit"):
        commit, plus, changes = str(flat["git_commit"]).partition("+")
        flat["git_commit"] = commit[:_COMMIT_DIGITS] + plus + changes
    flat |= values["packages"]
    return {name.replace("_", " "): _text(value) for name, value in flat.items()}


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _text(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
