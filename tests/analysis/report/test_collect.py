"""What is read of run directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locallearn.analysis import step_cost
from locallearn.analysis.report import RecordedRun, collect_runs, render_report
from locallearn.analysis.report.collect import RunCost
from locallearn.errors import UserError
from locallearn.models import build_model
from locallearn.rules import build_rule


def only(path: Path) -> RecordedRun:
    (run,) = collect_runs([path])
    return run


def test_finished_run(make_run) -> None:
    run = only(make_run("a", (50.0, 62.5, 60.0), blocks=("conv1", "linear1")))
    assert (run.name, run.is_finished, run.num_epochs) == ("a", True, 3)
    assert run.metrics.columns["test_acc"] == (50.0, 62.5, 60.0)
    assert run.last("test_acc") == 60.0
    assert run.metrics.blocks() == ("conv1", "linear1")
    # 1000 images at 500 a second.
    assert run.seconds() == (2.0, 4.0, 6.0)


def test_a_last_batch_of_one_image_took_no_time(make_run) -> None:
    run = only(make_run("a", data={"num_train": 129}))  # batches of 128
    assert run.seconds()[0] == 128 / 500


@pytest.mark.parametrize("num_epochs", [0, 1, 2])
def test_unfinished_run_has_the_epochs_there_are(make_run, num_epochs: int) -> None:
    run = only(make_run("a", (50.0, 60.0)[:num_epochs]))
    assert not run.is_finished
    assert run.num_epochs == num_epochs
    assert run.last("test_acc") == ((None, 50.0, 60.0)[num_epochs])


def test_metrics_that_were_cut_lose_the_cut_line_alone(make_run) -> None:
    path = make_run("a", (50.0, 60.0))
    metrics = path / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-3])  # 250.0 without its end would be another number
    assert only(path).metrics.columns["test_acc"] == (50.0,)
    metrics.write_text("")
    assert only(path).num_epochs == 0


def test_metrics_without_a_column_are_named(make_run) -> None:
    path = make_run("a")
    (path / "metrics.csv").write_text("epoch,test_acc,conv1_acc\n1,50.0,20.0\n")
    with pytest.raises(
        UserError, match=r"a/metrics\.csv can't be read: it has no column train_acc"
    ):
        collect_runs([path])


def test_runs_are_found_below_a_directory(make_run, tmp_path: Path) -> None:
    for name in ("t/lls/epochs-3/seed-1", "t/lls/epochs-3/seed-0", "t/bp"):
        make_run(name)
    # Others name their files so, too; and what lies in a run is no run.
    (tmp_path / "t/model").mkdir()
    (tmp_path / "t/model/config.json").write_text('{"architectures": ["Bert"]}')
    make_run("t/bp/figures/inner")
    names = [run.name for run in collect_runs([tmp_path / "t"])]
    assert names == ["bp", "lls/epochs-3/seed-0", "lls/epochs-3/seed-1"]


def test_each_run_comes_once(make_run, tmp_path: Path) -> None:
    paths = [make_run("t/b"), tmp_path / "t", make_run("t/a"), tmp_path / "t/../t/b"]
    assert [run.name for run in collect_runs(paths)] == ["b", "a"]


def test_runs_of_one_name_are_told_apart(make_run) -> None:
    paths = [make_run("x/one/seed-0"), make_run("x/two/seed-0"), make_run("seed-1")]
    names = [run.name for run in collect_runs(paths)]
    assert names == ["one/seed-0", "two/seed-0", "seed-1"]


def test_what_is_no_run(make_run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is no directory; expected a run directory"):
        collect_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run, .* Give run directories"):
        collect_runs([tmp_path / "empty"])
    config = make_run("broken") / "config.json"
    value = json.loads(config.read_text())
    for text, message in (
        ("{", r"config\.json is no valid JSON"),
        ("[]", r"config\.json was not written by locallearn"),
        (json.dumps(value | {"format_version": 9}), "format version 9"),
        (json.dumps(value | {"inputs": {}}), r"config\.json is incomplete"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            collect_runs([config.parent])
    config.write_text('{"format": "locallearn-run",')  # found on the way, too
    with pytest.raises(UserError, match=r"config\.json is no valid JSON"):
        collect_runs([tmp_path])


def test_what_others_wrote_is_passed_over_and_told(make_run, tmp_path: Path) -> None:
    make_run("t/b")
    for name, content in (("a", b"{"), ("c", b"\xff\xfe"), ("d", b"[]"), ("e", b"")):
        (tmp_path / "t" / name).mkdir()
        (tmp_path / "t" / name / "config.json").write_bytes(content)
    foreign: list[Path] = []
    assert [run.name for run in collect_runs([tmp_path / "t"], foreign.append)] == ["b"]
    assert [path.parent.name for path in foreign] == ["a", "c", "d", "e"]


def test_links_are_followed_to_runs_alone(make_run, tmp_path: Path) -> None:
    make_run("store/one")
    make_run("t/two")
    (tmp_path / "t/one").symlink_to(tmp_path / "store/one", target_is_directory=True)
    (tmp_path / "t/again").symlink_to(tmp_path / "t/two", target_is_directory=True)
    (tmp_path / "t/above").symlink_to(tmp_path, target_is_directory=True)
    make_run("elsewhere")
    assert [run.name for run in collect_runs([tmp_path / "t"])] == ["again", "one"]


def test_costs_are_those_of_step_cost(make_run) -> None:
    run = only(make_run("a", rule="lls-m", precision="bf16", backend="compiled", batch_size=32))
    expected = step_cost(
        build_model("smallconv", num_classes=10, in_channels=1, image_size=8),
        build_rule("lls-m"),
        image_shape=(1, 8, 8),
        batch_size=32,
        bytes_per_value=2,
    )
    assert run.cost.learning_signal_macs == expected.learning_signal_macs
    assert run.cost.total_macs == expected.total_macs
    assert run.cost.peak_activation_mib == expected.peak_activation_mib
    assert (run.cost.num_params, run.cost.num_additional_params) == (expected.num_params, 40)
    assert not run.cost.is_of_closed_form


@pytest.mark.parametrize(
    ("settings", "is_counted", "is_marked"),
    [
        ({"rule": "lls", "backend": "autograd"}, True, True),
        ({"rule": "lls", "backend": "reference"}, True, False),
        ({"rule": "bp"}, True, False),
        ({"rule": "bp", "bp_memory": "checkpoint"}, False, False),
        ({"rule": "bp", "dropout": 0.1}, False, False),
        ({"rule": "lls", "dropout": 0.1, "backend": "reference"}, True, False),
        ({"rule": "lls", "device": "cuda", "backend": "triton"}, False, False),
        ({"rule": "dfa"}, False, False),
        ({"rule": "lls", "norm": "none"}, False, False),
        ({"rule": "lls", "activation": "tanh"}, False, False),
        ({"rule": "lls", "head_after_pool": True}, False, False),
        ({"rule": "lls", "group_blocks": 2}, False, False),
    ],
)
def test_memory_is_given_where_it_is_counted(make_run, settings, is_counted, is_marked) -> None:
    cost = only(make_run("a", **settings)).cost
    assert (cost.peak_activation_mib is not None) == is_counted
    assert cost.is_of_closed_form == is_marked


def test_memory_that_reproduce_measured_is_read(make_run, tmp_path: Path) -> None:
    paths = [make_run(f"lls/3-epochs/seed-{seed}", seed=seed) for seed in (0, 1)]
    step = tmp_path / "lls/3-epochs/step.json"
    for text, expected in (
        ('{"peak_activation_mib": 71.25, "environment": {}}', 71.25),
        ('{"peak_activation_mib": "much"}', None),
        ('{"peak_activation_mib": NaN}', None),
        ("[]", None),
        ("{", None),
    ):
        step.write_text(text)
        assert [only(path).measured_peak_mib for path in paths] == [expected] * 2
    step.unlink()
    assert only(paths[0]).measured_peak_mib is None


def test_figures(make_run) -> None:
    path = make_run("a")
    assert only(path).figures == ()
    folder = path / "figures"
    folder.mkdir()
    for name in ("spectra.svg", "spectra.png", "cam.png", "odd.svg", "notes.txt"):
        (folder / name).write_text(name)
    value = {"figure": "spectra", "caption": "Spectra", "command": "do it", "numbers": {}}
    (folder / "spectra.json").write_text(json.dumps(value))
    (folder / "odd.json").write_text('{"caption": 7')
    cam, odd, spectra = only(path).figures
    assert (cam.media_type, cam.content, cam.caption) == ("image/png", b"cam.png", "cam.png")
    assert (odd.caption, odd.command) == ("odd.svg", "")
    assert (spectra.media_type, spectra.content) == ("image/svg+xml", b"spectra.svg")
    assert (spectra.caption, spectra.command) == ("Spectra", "do it")
    (folder / "odd.json").write_text('{"caption": 7}')
    assert only(path).figures[1].caption == "odd.svg"


def test_a_model_from_elsewhere_is_not_counted(make_run, tmp_path: Path) -> None:
    """Nor looked for: neither its file nor its package need be there."""
    for name in ("timm:no_such_model", f"{tmp_path}/gone/net.py:build:depth=3"):
        path = make_run(name.rpartition("/")[2].replace(":", "-"), model=name)
        run = only(path)
        assert run.cost == RunCost(None, None, None, None, None, is_of_closed_form=False)
        summary = {"test_acc": 70.0, "num_params": 12, "num_additional_params": 3}
        (path / "summary.json").write_text(json.dumps(summary))
        assert (only(path).cost.num_params, only(path).cost.num_additional_params) == (12, 3)
        page = render_report([only(path)], None)
        assert "12</td>" in page
