"""Runs: what they write, exact resume after any interruption, and what stops them."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import locallearn.engine.building as building_module
import locallearn.engine.team as team_module
import locallearn.engine.trainer as trainer_module
from locallearn import LocalLearner, UserError
from locallearn.cli.console import QuietObserver
from locallearn.engine import Interrupted, Snapshot, TrainConfig, Trainer, load_trained
from locallearn.engine.evaluation import evaluate
from locallearn.engine.files import write_atomically
from locallearn.engine.run import RunDirectory, load_checkpoint, save_checkpoint
from locallearn.kernels.compiled import compilation
from locallearn.models import BlockNetwork, ConvBlock
from locallearn.models.registry import _MODELS, register_model
from locallearn.rules import (
    HeadSpec,
    LatentHead,
    LatentRule,
    register_rule,
    unregister_rule,
)

# One thread: where others want the cores too, two that wait for each other took four times as long.
SMALL = {"epochs": 2, "limit_train": 400, "limit_test": 60, "num_threads": 1}
TIMINGS = {"images_per_second", "step_time_ms"}


class Recorder(QuietObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.snapshots: list[Snapshot] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def wants_progress(self) -> bool:
        return True

    def on_progress(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def on_epoch(self, row: dict[str, float], num_epochs: int) -> None:
        self.rows.append(row)


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch) -> None:
    """TensorBoard reads a run's files by name: time in seconds, then how many the process had
    written. Of two in one second the tenth would come before the ninth; processes apart have other
    seconds."""
    counter = event_file_writer.AtomicCounter(1_000_000)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def run(out: Path, **settings: Any) -> dict[str, Any]:
    return Trainer.start(TrainConfig(**{**SMALL, **settings}), out, Recorder()).fit()


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, states and metrics bit for bit; only measured times may differ."""
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(a) == rows(b)
    states = [load_checkpoint(x / "checkpoint.pt")["learner"]["optimizers"] for x in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_what_a_run_writes(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", rule="lls-mxm", val_split=0.2)
    out = RunDirectory(tmp_path / "run")
    assert out.is_finished
    assert json.loads(out.summary_path.read_text()) == summary
    assert summary["epochs"] == 2
    assert summary["test_acc"] == summary["test_acc_per_epoch"][-1]
    assert summary["best_test_acc"] == max(summary["test_acc_per_epoch"])
    wanted = {"rule": "lls-mxm", "basis": "square", "model": "smallconv", "dataset": "digits"}
    wanted |= {"seed": 0, "device": "cpu", "num_params": 361_194, "num_additional_params": 400}
    assert wanted.items() <= summary.items()
    assert summary["images_per_second"] > 0
    assert summary["step_time_ms_median"] > 0
    assert summary["test_acc_at_best_val"] in summary["test_acc_per_epoch"]

    with open(out.metrics_path, newline="") as file:
        table = list(csv.reader(file))
    head = ["epoch", "train_loss", "train_acc", "test_loss", "test_acc"]
    head += ["images_per_second", "step_time_ms"]
    blocks = [f"{b}_{x}" for b in ("conv1", "conv2", "conv3", "linear1") for x in ("loss", "acc")]
    assert table[0] == [*head, *blocks, "val_loss", "val_acc"]
    assert [row[0] for row in table[1:]] == ["1", "2"]

    config = json.loads(out.config_path.read_text())
    assert config["settings"]["temperature"] == 0.5
    assert config["settings"]["augment"] == "none"
    assert config["settings"]["lr"] == 0.005
    assert (config["data"]["num_train"], config["data"]["num_val"]) == (320, 80)
    assert config["environment"]["packages"]["torch"] == torch.__version__.split("+")[0] or (
        config["environment"]["packages"]["torch"] == torch.__version__
    )
    events = EventAccumulator(str(out.tensorboard_path)).Reload()
    assert [e.step for e in events.Scalars("test/acc")] == [1, 2]
    assert events.Scalars("test/acc")[-1].value == pytest.approx(summary["test_acc"])
    assert "conv1/loss" in events.Tags()["scalars"]
    leftovers = [p.name for p in out.path.iterdir() if p.name.endswith(".tmp")]
    assert leftovers == []


def test_defaults_are_the_papers() -> None:
    digits = TrainConfig().resolve()
    assert (digits.rule, digits.basis, digits.setting) == ("lls", "square", "official")
    assert (digits.batch_size, digits.lr, digits.optimizer) == (128, 5e-3, "schedulefree-adamw")

    def chosen(model: str, dataset: str) -> tuple[int | None, str | None]:
        config = TrainConfig(model=model, dataset=dataset).resolve()
        return config.epochs, config.augment

    assert chosen("smallconv", "cifar10") == (100, "basic")
    assert chosen("vgg8", "cifar100") == (300, "standard")
    assert chosen("vgg8", "mnist") == (100, "standard")
    assert chosen("mobilenet-v1", "folder") == (500, "standard")
    bp = TrainConfig(rule="bp").resolve()
    assert (bp.basis, bp.setting, bp.temperature, bp.label_smoothing) == (None, None, None, 0.0)
    assert digits.resolve() == digits


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "lls-mxm", "dropout": 0.2, "augment": "standard"},
        {"rule": "bp", "optimizer": "adamw", "schedule": "plateau", "val_split": 0.2},
        {"rule": "lls", "basis": "random", "optimizer": "sgd", "schedule": "cosine"},
        {"rule": "dfa", "dropout": 0.2},
        {"rule": "pepita", "dropout": 0.2, "schedule": "cosine"},
    ],
    ids=lambda s: s["rule"],
)
@pytest.mark.parametrize("stop_at", [(0, 2), (1, 1)], ids=["first epoch", "second epoch"])
def test_stopped_in_an_epoch_and_resumed_is_as_never_stopped(
    tmp_path: Path, settings: dict, stop_at: tuple[int, int]
) -> None:
    run(tmp_path / "whole", **settings)
    trainer = Trainer.start(TrainConfig(**SMALL, **settings), tmp_path / "cut", Recorder())
    step = trainer.learner.step

    def stopping(images, labels):
        if (trainer.epoch, trainer.step + 1) == stop_at:
            trainer.request_stop(15)
        return step(images, labels)

    trainer.learner.step = stopping
    with pytest.raises(Interrupted) as interruption:
        trainer.fit()
    assert interruption.value.signal_number == 15
    assert (trainer.epoch, trainer.step) == stop_at
    assert not RunDirectory(tmp_path / "cut").is_finished
    torch.manual_seed(99)  # whatever happened meanwhile
    Trainer.resume(tmp_path / "cut", Recorder()).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def one_block() -> Iterator[str]:
    """A model whose compiling takes seconds and not a minute."""

    @register_model("one-block", summary="the first of SmallConv", min_image_size=8)
    def build(*, in_channels: int, num_classes: int, **settings: Any) -> BlockNetwork:
        blocks = [ConvBlock(in_channels, 32, latent_size=4, max_pool=2)]
        return BlockNetwork(blocks, pool_size=2, num_classes=num_classes)

    yield "one-block"
    _MODELS.remove("one-block")


@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is not ours
def test_resumed_where_another_batch_is_met_first(
    tmp_path: Path, monkeypatch, one_block: str, needs_compiler: None
) -> None:
    """The smaller last batch of an epoch, by the compiled backend: still bit for bit."""
    settings = {"model": one_block, "backend": "compiled", "num_threads": 2}
    run(tmp_path / "whole", **settings)
    config = TrainConfig(**{**SMALL, **settings})
    trainer = Trainer.start(config, tmp_path / "stopped", Recorder())
    step = trainer.learner.step

    def stopping(images, labels):
        if trainer.step == 2:  # 400 images are three batches of 128 and one of 16
            trainer.request_stop(15)
        return step(images, labels)

    trainer.learner.step = stopping
    with pytest.raises(Interrupted):
        trainer.fit()
    assert (trainer.epoch, trainer.step) == (0, 3)
    # As in another process, which has compiled nothing yet.
    fresh = functools.cache(compilation._specialized.__wrapped__)
    monkeypatch.setattr(compilation, "_specialized", fresh)
    Trainer.resume(tmp_path / "stopped", Recorder()).fit()
    assert fresh.cache_info().currsize > 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


class Killed(BaseException):
    """Stands for kill -9: nothing may run after it but what had run before."""


@pytest.mark.parametrize(
    "moment",
    [
        "before the first checkpoint",
        "while the first checkpoint is written",
        "between checkpoint and metrics",
        "between metrics and the next epoch",
        "in the second epoch",
        "before the weights",
        "before the summary",
    ],
)
def test_killed_at_any_moment_and_resumed_is_as_never_killed(
    tmp_path: Path, monkeypatch, moment: str
) -> None:
    run(tmp_path / "whole")

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    trainer = Trainer.start(TrainConfig(**SMALL), tmp_path / "cut", Recorder())
    with monkeypatch.context() as patch:
        if moment == "before the first checkpoint":
            patch.setattr(trainer, "_save", kill)
        elif moment == "while the first checkpoint is written":

            def half(path: Path, state: dict) -> None:
                path.with_name(f".{path.name}.tmp").write_bytes(b"half of a check")
                raise Killed

            patch.setattr(trainer_module, "save_checkpoint", half)
        elif moment == "between checkpoint and metrics":
            patch.setattr(trainer.run, "write_metrics", kill)
        elif moment == "between metrics and the next epoch":
            patch.setattr(trainer.observer, "on_epoch", kill)
        elif moment == "in the second epoch":
            step = trainer.learner.step
            patch.setattr(
                trainer.learner,
                "step",
                lambda x, y: kill() if (trainer.epoch, trainer.step) == (1, 2) else step(x, y),
            )
        elif moment == "before the weights":
            patch.setattr(trainer_module, "save_weights", kill)
        else:
            patch.setattr(trainer.run, "write_summary", kill)
        with pytest.raises(Killed):
            trainer.fit()
    recorder = Recorder()
    Trainer.resume(tmp_path / "cut", recorder).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert any("starting over" in note for note in recorder.notes) == ("first" in moment)
    events = EventAccumulator(str(tmp_path / "cut" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("test/acc")] in ([1, 2], [2])


def interrupted(out: Path, **settings: Any) -> None:
    trainer = Trainer.start(TrainConfig(**{**SMALL, **settings}), out, Recorder())
    trainer.request_stop(2)
    with pytest.raises(Interrupted):
        trainer.fit()


def test_resume_refuses_other_settings_by_name(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    given = {"lr": 0.1, "rule": "lls", "epochs": 7}
    with pytest.raises(UserError, match=r"other settings: --lr \(run: 0.005, given: 0.1\), --epoc"):
        Trainer.resume(tmp_path / "run", Recorder(), given)
    Trainer.resume(tmp_path / "run", Recorder(), {"lr": 0.005, "rule": "lls"})


def test_resume_refuses_other_data_and_follows_moved_data(tmp_path: Path, make_folder) -> None:
    root = make_folder(per_class=20)
    interrupted(tmp_path / "run", dataset="folder", data_dir=str(root), limit_train=None)
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"data directory .* does not exist"):
        Trainer.resume(tmp_path / "run", Recorder())
    Trainer.resume(tmp_path / "run", Recorder(), {"data_dir": str(moved)})
    (moved / "train" / "apple" / "000.png").unlink()
    with pytest.raises(UserError, match=r"data of .* has changed since it was started"):
        Trainer.resume(tmp_path / "run", Recorder(), {"data_dir": str(moved)})


def spoil(run_directory: RunDirectory, what: str) -> None:
    checkpoint = run_directory.checkpoint_path
    if what == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif what == "empty":
        checkpoint.write_bytes(b"")
    elif what == "foreign zip":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    elif what == "pickle":
        torch.save(RunDirectory, checkpoint)
    elif what == "text":
        checkpoint.write_text("not a checkpoint")
    elif what == "other version":
        save_checkpoint(checkpoint, {})
        state = torch.load(checkpoint, weights_only=True)
        torch.save({**state, "format_version": 99}, checkpoint)
    elif what == "no config":
        run_directory.config_path.unlink()
    elif what == "broken config":
        run_directory.config_path.write_text("{")
    elif what == "foreign config":
        run_directory.config_path.write_text('{"a": 1}')
    elif what == "cut config":
        value = json.loads(run_directory.config_path.read_text())
        del value["inputs"]
        run_directory.config_path.write_text(json.dumps(value))
    elif what in ("edited number", "edited null", "setting gone", "later setting"):
        value = json.loads(run_directory.config_path.read_text())
        value["settings"]["epochs"] = {"edited number": "many", "edited null": None}.get(what, 2)
        if what == "setting gone":
            del value["settings"]["rule"]
        if what == "later setting":
            value["settings"]["mood"] = "good"
        run_directory.config_path.write_text(json.dumps(value))
    elif what == "missing":
        shutil.rmtree(run_directory.path)


def test_a_run_of_a_version_with_fewer_settings_goes_on_as_it_was(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    old = RunDirectory(tmp_path / "old")
    interrupted(old.path)
    later = ["width", "activation", "norm", "group_blocks", "similarity", "cache", "bp_memory"]
    value = json.loads(old.config_path.read_text())
    for name in later:
        del value["settings"][name]
    old.config_path.write_text(json.dumps(value))
    state = torch.load(old.checkpoint_path, weights_only=True)
    for name in later:
        del state["config"]["settings"][name]
    torch.save(state, old.checkpoint_path)
    Trainer.resume(old.path, Recorder()).fit()
    assert_same_run(tmp_path / "whole", old.path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"checkpoint.pt can't be read: it is truncated or no checkpoint"),
        ("empty", r"checkpoint.pt can't be read: it is truncated or no checkpoint"),
        ("text", r"checkpoint.pt can't be read: it is truncated or no checkpoint"),
        ("foreign zip", r"checkpoint.pt can't be read: it was not written by locallearn"),
        ("pickle", r"checkpoint.pt can't be read: it was not written by locallearn"),
        ("other version", r"has format version 99; this locallearn reads version 1"),
        ("no config", r"is no run directory: it holds no config.json"),
        ("broken config", r"config.json is no valid JSON"),
        ("foreign config", r"config.json was not written by locallearn"),
        ("cut config", r"config.json is incomplete or was edited \(KeyError\('inputs'\)\)"),
        ("edited number", r"a setting of the run has the wrong type"),
        ("edited null", r"settings of the run have no value: epochs"),
        ("setting gone", r"settings of the run are missing: rule"),
        ("later setting", r"has settings that this version does not know: mood. Use the version"),
        ("missing", r"is no directory; expected a run directory"),
    ],
)
def test_resume_of_something_else_is_one_clear_error(
    tmp_path: Path, what: str, message: str
) -> None:
    interrupted(tmp_path / "run")
    spoil(RunDirectory(tmp_path / "run"), what)
    with pytest.raises(UserError, match=message):
        Trainer.resume(tmp_path / "run", Recorder())


def test_an_occupied_directory_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run. .* --resume"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file; give a directory"):
        run(tmp_path / "file")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("conv2", r"loss of block conv2 became NaN at step 2 of epoch 2. The last good checkpoi"),
        ("output", r"loss of the output became infinite at step 2 of epoch 2"),
    ],
)
def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    tmp_path: Path, where: str, message: str
) -> None:
    trainer = Trainer.start(TrainConfig(**SMALL), tmp_path / "run", Recorder())
    step = trainer.learner.step

    def spoiled(images, labels):
        result = step(images, labels)
        if (trainer.epoch, trainer.step) == (1, 1):
            if where == "output":
                result.loss.fill_(float("inf"))
            else:
                for name in ("conv2", "conv3"):
                    result.block_losses[name].fill_(float("nan"))
        return result

    trainer.learner.step = spoiled
    with pytest.raises(UserError, match=message):
        trainer.fit()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1
    assert len(rows(tmp_path / "run")) == 1


def test_weights_that_the_last_step_breaks_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test loss that is NaN or infinite after epoch 1. No ep"):
        run(tmp_path / "run", limit_train=128, lr=1e38)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "a")
    interrupted(tmp_path / "b", seed=1)
    shutil.copy(tmp_path / "b" / "checkpoint.pt", tmp_path / "a" / "checkpoint.pt")
    with pytest.raises(UserError, match=r"is of another run than the config.json beside it"):
        Trainer.resume(tmp_path / "a", Recorder())


@pytest.mark.parametrize("free_then", [0, 1 << 40], ids=["streamed", "in memory"])
def test_where_images_are_kept_is_the_runs_own(
    tmp_path: Path, make_folder, monkeypatch, free_then: int
) -> None:
    """Resumed with other free memory, streaming and dropout on, as if never stopped."""
    settings = {"dataset": "folder", "data_dir": str(make_folder(per_class=20))}
    settings |= {"dropout": 0.3, "batch_size": 8, "limit_train": None, "augment": "standard"}
    monkeypatch.setattr(building_module, "free_memory_bytes", lambda: free_then)
    run(tmp_path / "whole", **settings)
    trainer = Trainer.start(TrainConfig(**{**SMALL, **settings}), tmp_path / "cut", Recorder())
    step = trainer.learner.step

    def stopping(images, labels):
        if trainer.step == 2:
            trainer.request_stop(15)
        return step(images, labels)

    trainer.learner.step = stopping
    with pytest.raises(Interrupted):
        trainer.fit()
    monkeypatch.setattr(building_module, "free_memory_bytes", lambda: (1 << 40) - free_then)
    Trainer.resume(tmp_path / "cut", Recorder()).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_rule_without_logits_trains(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Silent(LatentRule):
        name = "silent"
        summary = "a loss without logits"
        trains = "nothing"

        def build_head(self, spec: HeadSpec) -> LatentHead:
            return SilentHead()

    class SilentHead(LatentHead):
        def loss(self, latents, labels):
            return (latents.mean(dim=1) - labels).square().mean(), None

    register_rule(Silent)
    try:
        run(tmp_path / "run", rule="silent")
    finally:
        unregister_rule("silent")
    assert "conv1_loss" in rows(tmp_path / "run")[0]
    assert "conv1_acc" not in rows(tmp_path / "run")[0]


def test_losses_are_found_late_with_their_step(tmp_path: Path, monkeypatch) -> None:
    """As on a GPU, where the losses are looked at only now and then."""
    trainer = Trainer.start(TrainConfig(**SMALL), tmp_path / "run", Recorder())
    trainer.step = 7
    good, bad = torch.ones(5), torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
    trainer._unchecked = [good, bad, good]
    with pytest.raises(UserError, match=r"block conv1 became NaN at step 6 of epoch 1. No epoch"):
        trainer._check_losses()


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch) -> None:
    trainer = Trainer.start(TrainConfig(**SMALL), tmp_path / "run", Recorder())
    real, checkpoint = trainer_module.save_checkpoint, tmp_path / "run" / "checkpoint.pt"
    saved: list[bytes] = []

    def refuse(*arguments: object) -> None:
        raise OSError(28, "full")

    def full(path: Path, state: dict) -> None:
        if saved:
            monkeypatch.setattr("os.fsync", refuse)
        real(path, state)
        saved.append(path.read_bytes())

    monkeypatch.setattr(trainer_module, "save_checkpoint", full)
    with pytest.raises(OSError, match="full"):
        trainer.fit()
    assert checkpoint.read_bytes() == saved[0]
    assert not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.undo()
    assert Trainer.resume(tmp_path / "run", Recorder()).fit()["epochs"] == 2


def test_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"one")
    write_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError(13, "no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(target, b"three")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"two"


# -- the loop's own promises --------------------------------------------------------------------


def test_evaluation_weights_and_statistics_come_by_themselves(tmp_path: Path, monkeypatch) -> None:
    """Each test runs at the averaged weights, right after BatchNorm was measured at them."""
    seen: list[str] = []
    recalibrate, real = LocalLearner.recalibrate, evaluate

    def watch_recalibrate(self: LocalLearner, batches) -> None:
        batches = list(batches)
        seen.append(f"recalibrate on {len(batches)}")
        recalibrate(self, batches)

    def watch_evaluate(infer, loader, num_classes):
        learner = infer.__self__.learner
        modes = {o.param_groups[0]["train_mode"] for o in learner.optimizers.values()}
        assert modes == {False}
        assert not learner.model.training
        seen.append("evaluate")
        return real(infer, loader, num_classes)

    monkeypatch.setattr(LocalLearner, "recalibrate", watch_recalibrate)
    monkeypatch.setattr(team_module, "evaluate", watch_evaluate)
    run(tmp_path / "run")
    assert seen == ["recalibrate on 4", "evaluate"] * 2
    seen.clear()
    run(tmp_path / "many", limit_train=None, batch_size=16, epochs=1)
    assert seen == ["recalibrate on 50", "evaluate"]


def test_a_plain_optimizer_needs_no_recalibration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(LocalLearner, "recalibrate", lambda self, batches: pytest.fail("called"))
    run(tmp_path / "run", optimizer="adamw", epochs=1)


def test_seeds_decide(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, seed=seed, augment="basic")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_progress(tmp_path: Path) -> None:
    recorder = Recorder()
    Trainer.start(TrainConfig(**SMALL), tmp_path / "run", recorder).fit()
    assert [(s.epoch, s.step) for s in recorder.snapshots] == [
        (e, s) for e in (1, 2) for s in (1, 2, 3, 4)
    ]
    last = recorder.snapshots[-1]
    assert (last.num_epochs, last.num_steps) == (2, 4)
    assert last.loss == recorder.rows[-1]["train_loss"]
    assert last.accuracy == recorder.rows[-1]["train_acc"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, r"--batch-size must be at least 1, got 0"),
        ({"batch_size": -5}, r"--batch-size must be at least 1, got -5"),
        ({"test_batch_size": 0}, r"--test-batch-size must be at least 1"),
        ({"lr": -1.0}, r"--lr must be above 0, got -1.0"),
        ({"lr": float("nan")}, r"--lr must be above 0, got nan"),
        ({"weight_decay": -1.0}, r"--weight-decay must be at least 0"),
        ({"num_threads": 0}, r"--num-threads must be at least 1"),
        ({"num_threads": 100_000}, r"at most 1024, got 100000"),
        ({"weight_decay": float("nan")}, r"--weight-decay must be at least 0, got nan"),
        ({"temperature": float("inf")}, r"temperature must be above 0, got inf"),
        ({"seed": -1}, r"--seed must be between 0 and"),
        ({"device": "gpu"}, r"unknown device 'gpu'.* Valid: auto, cpu, cuda, mps"),
        ({"precision": "fp16"}, r"unknown precision 'fp16'"),
        ({"schedule": "cosine"}, r"is schedule-free and takes no schedule"),
        ({"rule": "bp", "basis": "square"}, r"rule 'bp' has no option 'basis'"),
        ({"model": "vgg8"}, r"images of 8x8 pixels are too small for vgg8"),
        ({"limit_train": 1}, r"a training set of one image is too small"),
    ],
)
def test_bad_settings_leave_no_directory(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(UserError, match=r"--device cuda: torch .* sees no such device"):
        TrainConfig(device="cuda").resolve()


def test_compile_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler .* Install it, or"):
        TrainConfig(compile=True, device="cpu").resolve()


# -- reading a run back -------------------------------------------------------------------------


def test_weights_from_run_checkpoint_and_file_agree(tmp_path: Path) -> None:
    run(tmp_path / "run", rule="lls", basis="random")
    images = torch.randn(5, 1, 8, 8)
    found = [
        load_trained(tmp_path / "run" / name) for name in ("", "checkpoint.pt", "model.safetensors")
    ]
    logits = [trained.learner(images) for trained in found]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert [t.needs_recalibration for t in found] == [False] * 3
    assert found[0].config.class_names == tuple("0123456789")
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(tmp_path / "run" / "model.safetensors", moved)
    assert torch.equal(load_trained(moved).learner(images), logits[0])


def test_a_checkpoint_from_the_middle_of_an_epoch_wants_statistics(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    assert load_trained(tmp_path / "run").needs_recalibration
    interrupted(tmp_path / "plain", optimizer="adamw")
    assert not load_trained(tmp_path / "plain").needs_recalibration


def test_what_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    run(tmp_path / "run", epochs=1)
    weights = tmp_path / "run" / "model.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (cut, r"is truncated or no safetensors file"),
        (tmp_path / "foreign.safetensors", r"was not written by locallearn"),
        (tmp_path / "nothing", r"does not exist; give a run directory"),
        (tmp_path / "empty", r"is no run directory"),
    ):
        with pytest.raises(UserError, match=message):
            load_trained(path)
    (tmp_path / "run" / "summary.json").unlink()
    weights.unlink()
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match=r"has no weights yet: .* --resume"):
        load_trained(tmp_path / "run")


def test_packages_that_an_earlier_version_did_not_record_are_no_difference(tmp_path: Path) -> None:
    run(tmp_path / "run", epochs=1)
    record = RunDirectory(tmp_path / "run")
    for path in (record.summary_path, record.checkpoint_path):
        path.unlink()
    config = json.loads(record.config_path.read_text())
    del config["environment"]["packages"]["timm"]
    recorder = Recorder()
    for version, num_notes in ((config["environment"]["packages"]["torch"], 0), ("1.0", 1)):
        config["environment"]["packages"]["torch"] = version
        record.config_path.write_text(json.dumps(config))
        recorder.notes.clear()
        Trainer.resume(record.path, recorder)
        assert sum("package versions" in note for note in recorder.notes) == num_notes
