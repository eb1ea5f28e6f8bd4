"""Groups, means and differences, worked by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from locallearn.analysis import MeanStd
from locallearn.analysis.report import collect_runs
from locallearn.analysis.report.compare import (
    Group,
    Property,
    environment_of,
    group_runs,
    mean_std,
    settings_of,
)


def groups_of(*paths: Path) -> list[Group]:
    return group_runs(collect_runs(paths))


def test_mean_and_deviation_of_what_is_there() -> None:
    # Deviations -3, -1, 4: squares sum to 26, over n - 1 = 2.
    assert mean_std([2.0, None, 4.0, 9.0]) == MeanStd(5.0, pytest.approx(math.sqrt(13)))
    assert mean_std([7.0]) == MeanStd(7.0, None)
    assert mean_std([None]) is None


def test_runs_that_differ_in_the_seed_alone_are_one_group(make_run) -> None:
    (group,) = groups_of(
        make_run("b", (50.0, 60.0, 90.0), seed=4),
        make_run("a", (40.0, 60.0, 80.0), seed=3, data_dir="/elsewhere"),
    )
    assert [run.config.settings.seed for run in group.runs] == [3, 4]
    last = group.last("test_acc")
    assert last is not None
    assert (last.mean, last.std) == (85.0, pytest.approx(math.sqrt(50)))
    curve = group.curve("test_acc")
    assert [each.mean for each in curve if each] == [45.0, 60.0, 85.0]
    assert [each.std for each in curve if each] == pytest.approx([math.sqrt(50), 0, math.sqrt(50)])
    assert group.seconds() == [2.0, 4.0, 6.0]


def test_what_only_some_seeds_recorded_ends_with_the_others(make_run) -> None:
    long, short = make_run("a"), make_run("b", seed=1)
    lines = (short / "metrics.csv").read_text().splitlines(keepends=True)
    (short / "metrics.csv").write_text("".join(lines[:-1]).replace("test_loss", "other"))
    (group,) = groups_of(long, short)
    assert group.num_epochs == len(group.curve("test_loss")) == len(group.seconds()) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1, "lr": 0.1},
        {"seed": 1, "num_threads": 2},
        {"seed": 1, "data": {"fingerprint": "1-3"}},
        {"seed": 0},  # the same again is no other seed
        {"seed": 1, "test_acc": (50.0,)},  # not finished
    ],
)
def test_other_runs_are_groups_of_their_own(make_run, other) -> None:
    assert len(groups_of(make_run("a"), make_run("b", **other))) == 2


def test_the_validation_split_is_the_seed_s(make_run) -> None:
    first, second = (
        {"seed": seed, "val_split": 0.1, "data": {"fingerprint": f"{seed}-7-{seed}"}}
        for seed in (0, 1)
    )
    assert len(groups_of(make_run("a", **first), make_run("b", **second))) == 1


def test_labels_say_what_differs(make_run) -> None:
    groups = groups_of(
        make_run("a", dropout=0.1),
        make_run("b", dropout=0.1, basis="cosine"),
        make_run("c", dropout=0.1, rule="bp"),
        make_run("d", dropout=0.1, channels_last=False, lr=0.01),
    )
    expected = ["lls", "lls, basis cosine", "bp", "lls, lr 0.01, no channels last"]
    assert [group.label for group in groups] == expected
    assert [group.style for group in groups] == [0, 1, 2, 3]


def test_one_label_has_one_look_in_every_task(make_run) -> None:
    groups = groups_of(
        make_run("a", rule="bp"),
        make_run("c", rule="lls", model="smallconv-l"),
        make_run("b", rule="lls"),  # goes with the first
    )
    assert [(g.task, g.label, g.style) for g in groups] == [
        ("digits, smallconv", "bp", 0),
        ("digits, smallconv", "lls", 1),
        ("digits, smallconv-l", "lls", 1),
    ]


def test_machines_are_named_only_where_nothing_else_differs(make_run) -> None:
    groups = groups_of(
        make_run("a", backend="compiled"),
        make_run("b", backend="autograd", rule="bp", num_threads=2),
    )
    assert [group.label for group in groups] == ["lls", "bp"]
    groups = groups_of(
        make_run("a", backend="compiled"),
        make_run("c", backend="reference"),
        make_run("d", backend="reference", num_threads=2),
        make_run("e", backend="compiled", model="smallconv-l"),
    )
    assert [group.label for group in groups] == [
        "lls, backend compiled",
        "lls, backend reference, num threads 1",
        "lls, backend reference, num threads 2",
        "lls",
    ]


def test_labels_that_would_be_alike_name_the_run(make_run) -> None:
    labels = [group.label for group in groups_of(make_run("old"), make_run("new"))]
    assert labels == ["lls (old)", "lls (new)"]


def test_folders_are_tasks_of_their_own(make_run) -> None:
    settings = {"dataset": "folder"}
    groups = groups_of(
        make_run("a", data_dir="/data/cats", **settings),
        make_run("b", data_dir="/data/birds", data={"fingerprint": "3-4"}, **settings),
    )
    assert [g.task for g in groups] == ["cats, smallconv", "birds, smallconv"]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"fingerprint": "1-9"}, ["cats, smallconv, test data 2", "cats, smallconv, test data 9"]),
        (
            {"fingerprint": "1-9", "num_test": 1500},
            ["cats, smallconv, 200 test images", "cats, smallconv, 1,500 test images"],
        ),
        ({"fingerprint": "9-2"}, ["cats, smallconv"] * 2),  # trained on others, tested on the same
    ],
)
def test_other_test_images_are_another_task(make_run, data, names) -> None:
    settings = {"dataset": "folder"}
    groups = groups_of(
        make_run("a", data_dir="/one/cats", **settings),
        make_run("b", data_dir="/two/cats", rule="bp", data=data, **settings),
    )
    assert [g.task for g in groups] == names


def test_other_classes_are_another_task(make_run) -> None:
    paths = [make_run("a"), make_run("b", rule="bp"), make_run("c", rule="dfa")]
    for path, old, new in ((paths[1], '"9"', '"nine"'), (paths[2], '"8",', "")):
        text = (path / "config.json").read_text()
        (path / "config.json").write_text(re.sub(rf"\n *{old}", f"\n{new}", text))
    first, second, third = (group.task for group in groups_of(*paths))
    assert first.startswith("digits, smallconv, 10 classes, class names ")
    assert second.startswith("digits, smallconv, 10 classes, class names ")
    assert (first != second, third) == (True, "digits, smallconv, 9 classes")


def test_data_that_was_moved_is_the_same_task(make_run) -> None:
    settings = {"dataset": "folder"}
    groups = groups_of(
        make_run("a", data_dir="/one/cats", **settings),
        make_run("b", data_dir="/two/copy", rule="bp", **settings),
    )
    assert [g.task for g in groups] == ["cats, smallconv"] * 2


def test_settings_that_differ(make_run) -> None:
    groups = groups_of(
        make_run("a", seed=0), make_run("b", seed=5), make_run("c", lr=0.1, dropout=0.5)
    )
    differing = [row for row in settings_of(groups) if row.differs]
    assert differing == [
        Property("lr", ("0.005", "0.1")),
        Property("dropout", ("0", "0.5")),
        Property("seed", ("0, 5", "0")),
    ]
    equal = {row.name: row.values for row in settings_of(groups) if not row.differs}
    assert equal["rule"] == ("lls", "lls")
    assert equal["channels_last"] == ("yes", "yes")
    assert equal["image"] == ("1x8x8", "1x8x8")


def test_environment_that_differs(make_run) -> None:
    newer = {"packages": {"torch": "2.16.0"}, "created": "2027-01-01T00:00:00+00:00"}
    groups = groups_of(
        make_run("a", seed=0), make_run("b", seed=1, environment=newer), make_run("c", lr=0.1)
    )
    rows = {row.name: row for row in environment_of(groups)}
    assert [name for name, row in rows.items() if row.differs] == ["torch"]
    assert rows["torch"].values == ("2.15.0, 2.16.0", "2.15.0")
    assert rows["git commit"].values[0] == "0123456789ab+changes"


def test_models_files_of_one_name_are_told_apart(make_run, tmp_path: Path) -> None:
    """By their directories, or where those are the same by their content."""
    first, second = tmp_path / "one" / "net.py", tmp_path / "two" / "net.py"
    for number, file in enumerate((first, second)):
        file.parent.mkdir()
        file.write_text(f"NUMBER = {number}")
    runs = [make_run("a", model=f"{first}:build")]
    (group,) = groups_of(*runs)
    assert group.task == "digits, net.py:build"
    runs.append(make_run("b", model=f"{second}:build"))
    assert [group.task for group in groups_of(*runs)] == [
        f"digits, net.py:build, {file}:build" for file in (first, second)
    ]
    first.write_text("NUMBER = 3")
    edited = make_run("c", model=f"{first}:build")
    before, after = groups_of(runs[0], edited)
    assert re.fullmatch(r"digits, net.py:build, model's file \w{12}", before.task)
    assert before.task != after.task
    digest = next(each for each in settings_of([before, after]) if each.name == "model_digest")
    assert [len(value) for value in digest.values] == [12, 12]
