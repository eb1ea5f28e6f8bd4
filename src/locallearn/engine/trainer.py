"""The training loop: epochs of steps, evaluation, checkpoints, and an exact resume.

It prints nothing; an observer is told what happens.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from locallearn.data import DataListener, Dataset, MemoryImages
from locallearn.data.loader import EpochLoader
from locallearn.engine.backend_choice import choose_run_backend
from locallearn.engine.building import (
    build_learner,
    check_model,
    evaluation_loader,
    example_input,
    load_data,
    needs_recalibration,
    resident_inputs,
    training_loader,
)
from locallearn.engine.config import TrainConfig, differing_settings, flag
from locallearn.engine.environment import describe_environment
from locallearn.engine.evaluation import Evaluation, evaluate
from locallearn.engine.finetuning import (
    FineTuning,
    PeakWatch,
    TrainingFront,
    class_counts,
    load_start,
)
from locallearn.engine.graphs import GraphedStep, is_run_graphed
from locallearn.engine.learner import LocalLearner
from locallearn.engine.optimizers import build_schedule
from locallearn.engine.results import StepResult
from locallearn.engine.run import (
    NETWORK_COLUMNS,
    Row,
    RunConfig,
    RunDirectory,
    load_checkpoint,
    save_checkpoint,
)
from locallearn.engine.streams import RECALIBRATION, RandomStreams
from locallearn.engine.sums import EpochSums
from locallearn.engine.team import Team
from locallearn.engine.weights import save_weights
from locallearn.errors import UserError
from locallearn.models import is_foreign
from locallearn.rules import LocalRule, rule_package

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Steps between looks at the losses for NaN and infinity where looking makes the host wait for
# the device. On the CPU every step is looked at.
_CHECK_INTERVAL = 50
# Settings that say where data lies, and change nothing of what comes of it.
_PLACES = ("data_dir", "cache")


@dataclass(frozen=True)
class Snapshot:
    """Where an epoch is: what a progress bar shows.

    epoch: from 1; step: steps done of num_steps; loss and accuracy (percent): means over the
    epoch so far, of the network's output; images_per_second: over the epoch so far; loads: of each
    of several processes, the share of the last seconds that it did not wait.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    loss: float
    accuracy: float
    images_per_second: float
    loads: tuple[float, ...] = ()


class Observer(DataListener, Protocol):
    """Told what the loop, and what the loading of the data before it, does.

    All methods return at once.
    """

    def on_start(self, config: RunConfig, learner: LocalLearner, run: RunDirectory) -> None: ...

    def on_note(self, text: str) -> None: ...

    def wants_progress(self) -> bool:
        """Asked after every step; a snapshot makes the host wait for the device."""
        ...

    def on_progress(self, snapshot: Snapshot) -> None: ...

    def on_evaluation(self, epoch: int) -> None: ...

    def on_epoch(self, row: Row, num_epochs: int) -> None: ...


class Interrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """Training stopped on request; all is saved and can be resumed.

    Arguments:
        signal_number: what asked for it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Trainer:
    """Trains what a config says, into a run directory.

    Made by :meth:`start` or :meth:`resume`; then :meth:`fit`.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        run: RunDirectory,
        observer: Observer,
        team: Team,
    ) -> None:
        settings = config.settings
        assert settings.epochs is not None
        assert settings.num_threads is not None
        self.config = config
        self.settings = settings
        self.run = run
        self.observer = observer
        self.team = team
        self.num_epochs = settings.epochs

        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(settings.seed)
        self.device = torch.device(settings.device)
        self.learner = build_learner(
            settings,
            dataset.inputs,
            dataset.num_classes,
            device=self.device,
            compile=settings.compile,
        )
        check_model(settings)  # again: its file may have been edited while data was loaded
        for name in self.learner.loss_names:
            if name in NETWORK_COLUMNS:
                raise UserError(
                    f"block {name!r} has a name that metrics.csv has for the whole network. Rename "
                    f"the module, or choose other blocks."
                )
        if settings.backend == "compiled":
            self._compile_for_a_full_batch(dataset)
        self.schedules = {
            name: schedule
            for name, optimizer in self.learner.optimizers.items()
            if (schedule := build_schedule(settings.schedule, optimizer, self.num_epochs))
        }
        self._recalibrates = needs_recalibration(settings)
        whole = training_loader(settings, dataset, self.device)
        if whole.num_images < 2:
            raise UserError("a training set of one image is too small: give at least two.")
        self.train_loader: EpochLoader[Any] = whole
        # On CUDA the whole step, augmentation included, is one graph; see `graphs`.
        self._step: Callable[[Any, Tensor], StepResult] = self._plain_step
        is_graphed = is_run_graphed(settings, self.learner, is_alone=team.is_alone)
        if is_graphed:
            self._step = GraphedStep(self.learner, self._make_batch, resident_inputs(whole))
        size = settings.test_batch_size
        self.test_loader: EpochLoader[Any] = evaluation_loader(
            dataset.test, dataset, size, self.device
        )
        self.val_loader: EpochLoader[Any] | None = None
        if dataset.val is not None:
            self.val_loader = evaluation_loader(dataset.val, dataset, size, self.device)

        # A captured graph draws as it was captured to.
        self._streams = None if is_graphed else _random_streams(settings, self.learner, team)
        self._dataset = dataset
        self._front: TrainingFront | None = None
        self.peak = PeakWatch.of(settings, self.learner, self.device)

        # Where the run is; all of it goes into the checkpoint.
        self.epoch = 0
        self.step = 0
        self.rows: list[Row] = []
        self.train_seconds = 0.0  # of this epoch's steps
        self.total_seconds = 0.0
        self.sums = self._new_sums()
        self.best: dict[str, Any] | None = None  # with --keep best: the epoch, and its weights
        self.evaluations: dict[str, Evaluation] = {}  # of the last epoch, by part
        self._unchecked: list[Tensor] = []

    # -- making one -----------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        settings: TrainConfig,
        out: Path,
        observer: Observer,
        finetuning: FineTuning | None = None,
        team: Team | None = None,
    ) -> Trainer:
        """A new run in ``out``, which is made once everything else is known to be right.

        Arguments:
            settings: resolved or not; of a fine-tuning those that were planned for it.
            out: the run directory to be.
            observer: is told.
            finetuning: the weights to start from, and the data that was looked at for them.
            team: the processes that share the work; this one alone where None.

        Raises:
            UserError: bad settings or data, a model that can't be built, or a directory that holds
                a run already.
            OSError: as the file system says.
        """
        run, team = RunDirectory(out), team or Team()
        with team.together("checking the settings"):
            if team.is_first:
                run.check_free()
            settings = settings.resolve()
            check_model(settings)
            if finetuning is None and settings.start_from is not None:
                raise UserError("start_from is of `locallearn finetune`, which reads the weights.")
        if finetuning is None:
            dataset = team.load(lambda: load_data(settings, listener=observer))
        else:
            dataset = finetuning.dataset
        # One chooses for all: what is measured comes out otherwise in each.
        backend, reason = team.first(
            lambda: choose_run_backend(settings, dataset, team), "choosing a backend"
        )
        settings = replace(settings, backend=backend)
        config = RunConfig(
            settings=settings,
            inputs=dataset.inputs,
            class_names=dataset.class_names,
            data={
                "num_train": len(dataset.train),
                "num_val": 0 if dataset.val is None else len(dataset.val),
                "num_test": len(dataset.test),
                "augmentation": dataset.augmentation.describe(),
                "fingerprint": dataset.fingerprint(),
                "in_memory": isinstance(dataset.train, MemoryImages),
                "notes": list(dataset.notes),
                "backend_reason": reason,
                **({} if finetuning is None else {"finetune": finetuning.record}),
            },
            environment=_environment(settings) | team.describe(),
        )
        team.agree(_facts(config))
        config = team.first(lambda: config, "sharing the settings")
        with team.together("building the network"):
            trainer = cls(config, dataset, run, observer, team)
        trainer._join_team()
        if finetuning is not None:
            loaded = load_start(
                trainer.learner, finetuning.start, settings, dataset.inputs, dataset.class_names
            )
            config.data["finetune"]["loaded"] = loaded.to_json()
            trainer._skip_front()
            # What the weights were read from is needed no more, however early the run is stopped.
            run.path.mkdir(parents=True, exist_ok=True)
            trainer._save()
        with team.together("making the run directory"):
            if team.is_first:
                run.create(config)
        for note in dataset.notes:
            observer.on_note(note)
        return trainer

    @classmethod
    def resume(
        cls,
        directory: Path,
        observer: Observer,
        given: dict[str, Any] | None = None,
        team: Team | None = None,
    ) -> Trainer:
        """An interrupted run, where it was left; from the start if it left no checkpoint.

        Arguments:
            directory: of the run.
            observer: is told.
            given: settings that the user repeated; they must be the run's own, apart from
                ``data_dir``, whose data must only have the same content, and ``cache``, which
                changes nothing but the time it takes.
            team: the processes that share the work, however many shared it before; this one alone
                where None. The run's files need be where the first of them is.

        Raises:
            UserError: no run directory, other settings (named), other data, another content of the
                model's file, or a checkpoint that can't be read.
        """
        run, team = RunDirectory(directory), team or Team()
        config, checkpoint = team.first(lambda: _read_run(run, given or {}), "reading the run")
        with team.together("checking the settings"):
            settings = config.settings.resolve()
            check_model(settings)
            if settings.start_from is not None and not team.is_alone:
                raise UserError(
                    f"{directory} is of `locallearn finetune`, which trains in one process. Resume "
                    f"it without torchrun."
                )
            notes = team.going_on(directory, config.environment)
        dataset = team.load(
            lambda: load_data(
                settings,
                data_dir=(given or {}).get("data_dir"),
                cache=(given or {}).get("cache"),
                in_memory=config.data["in_memory"],
                view=config.inputs,
                listener=observer,
            )
        )
        with team.together("checking the data"):
            if dataset.fingerprint() != config.data["fingerprint"]:
                raise UserError(
                    f"the data of {directory} has changed since it was started "
                    f"(fingerprint {dataset.fingerprint()}, was {config.data['fingerprint']}). "
                    f"Restore it, or start a new run with --out."
                )
        team.agree(_facts(config, environment=_environment(settings)))
        with team.together("building the network"):
            trainer = cls(config, replace(dataset, inputs=config.inputs), run, observer, team)
        trainer._join_team()
        for note in notes:
            observer.on_note(note)
        then, now = config.environment, _environment(settings)
        # Of those that were recorded then: an earlier version recorded fewer.
        versions = {name: now["packages"].get(name) for name in then["packages"]}
        if then["packages"] != versions or then["device_name"] != now["device_name"]:
            observer.on_note(
                "package versions or device differ from those the run was started with: it goes "
                "on, but not bit for bit as it would have there"
            )
        if checkpoint is None and settings.start_from is not None:
            raise UserError(
                f"{run.checkpoint_path} is gone, and with it the weights that the run started "
                f"from. Start a new run: `locallearn finetune --from ...`."
            )
        if checkpoint is None:
            observer.on_note("no checkpoint was written yet: starting over")
        else:
            if RunConfig.from_json(checkpoint.get("config"), run.checkpoint_path) != config:
                raise UserError(
                    f"{run.checkpoint_path} is of another run than the config.json beside it."
                )
            try:
                trainer._load_state(checkpoint)
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{run.checkpoint_path} does not fit the run's config.json ({error})."
                ) from error
        trainer._skip_front()
        return trainer

    def _join_team(self) -> None:
        settings, dataset = self.settings, self._dataset

        def twin() -> LocalLearner:
            # Its default, all devices, opens a context on each.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                return build_learner(
                    settings, dataset.inputs, dataset.num_classes, device=self.device
                )

        images = example_input(dataset.inputs).to(self.device)
        self.team.join(self.learner, settings, twin, images)
        self.train_loader = self.team.training_loader(self.train_loader)

    # -- the loop -------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, and write the results.

        Returns:
            What summary.json holds.

        Raises:
            UserError: a loss that is NaN or infinite.
            Interrupted: :meth:`request_stop` was called; all is saved.
            OSError: as the file system says; the last checkpoint is whole.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.observer.on_start(self.config, self.learner, self.run)
        writer = None
        if self.team.is_first:
            if self.rows:
                self.run.write_metrics(self.rows)
            # What was written of epochs after the checkpoint is purged: they come again.
            writer = SummaryWriter(str(self.run.tensorboard_path), purge_step=self.epoch + 1)
        skipped = self._front.skipped() if self._front else contextlib.nullcontext()
        try:
            with skipped, self.team.working(self.run.path):
                self._train_epochs(writer)
        finally:
            if self._streams is not None:
                self._streams.close()
            if writer is not None:
                writer.close()
        return self._finish_run()

    def _train_epochs(self, writer: SummaryWriter | None) -> None:
        while self.epoch < self.num_epochs:
            self._train_epoch()
            row = self._finish_epoch()
            if writer is not None:
                for name, value in row.items():
                    if name != "epoch":
                        writer.add_scalar(_tensorboard_tag(name), value, self.epoch)
                writer.flush()
            self.observer.on_epoch(row, self.num_epochs)
            stop = self.team.stop_at_epoch()
            if stop is not None and self.epoch < self.num_epochs:
                raise Interrupted(stop)

    def request_stop(self, signal_number: int) -> None:
        """Have :meth:`fit` save everything after this step, and raise Interrupted."""
        self.team.request_stop(signal_number)

    def _train_epoch(self) -> None:
        began = time.perf_counter() - self.train_seconds
        interval = 1 if self.device.type == "cpu" else _CHECK_INTERVAL
        for crops, labels in self.train_loader.crops(self.epoch, start=self.step):
            if self._streams is not None:
                self._streams.begin(self.epoch, self.step)
            self.team.tell(self.epoch + 1, self.step + 1, self.sums)
            result = self.peak.step(self._step, crops, labels)
            self._unchecked.append(self.sums.add(result, labels))
            self.step += 1
            if len(self._unchecked) >= interval:
                self._check_losses()
            self.train_seconds = time.perf_counter() - began
            if self.observer.wants_progress():
                self.observer.on_progress(self._snapshot())
            stop = self.team.stop(is_last=self.step >= len(self.train_loader))
            if stop is not None:
                break
        else:
            stop = self.team.left_early()
        if stop is not None:
            self._check_losses()
            self._save()
            raise Interrupted(stop)
        self._check_losses()
        self._synchronize()
        self.train_seconds = time.perf_counter() - began

    def _compile_for_a_full_batch(self, dataset: Dataset) -> None:
        """Compile on a learner that is thrown away.

        Loops are spread over threads by the batch that they are first compiled for, and sums are
        then added up in another order. A resumed run may begin with the smaller last batch of an
        epoch; so that it equals one that was never stopped, every run compiles for a full one.
        """
        inputs, size = dataset.inputs, min(self.settings.batch_size, len(dataset.train))
        with torch.random.fork_rng(devices=[]):
            twin = build_learner(self.settings, inputs, dataset.num_classes, device=self.device)
            images = torch.randn(size, inputs.num_channels, *inputs.image_size)
            labels = torch.arange(size) % dataset.num_classes
            twin.step(images.to(self.device), labels.to(self.device))

    def _skip_front(self) -> None:
        """With --cache, have the frozen blocks in front run once, and train behind them."""
        settings = self.settings
        if settings.feature_cache is None:
            return
        self._front = TrainingFront.of(
            self.learner, settings, self._dataset, self.device, self.observer
        )
        self.train_loader = self._front.train_loader
        self.test_loader = self._front.test_loader
        self.val_loader = self._front.val_loader

    def _make_batch(self, crops: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.train_loader.images(crops), labels

    def _plain_step(self, crops: Any, labels: Tensor) -> StepResult:
        return self.team.step(*self._make_batch(crops, labels))

    def _finish_epoch(self) -> Row:
        """Evaluate, write the row and the checkpoint, and go to the next epoch."""
        epoch = self.epoch + 1
        self.observer.on_evaluation(epoch)
        if self._recalibrates:
            if self._streams is not None:
                self._streams.begin(self.epoch, RECALIBRATION)
            self.peak.recalibration(lambda: self.team.recalibrate(self.train_loader, self.epoch))
        self.learner.eval()
        num_classes = self.learner.num_classes
        test = self.team.evaluate(self.peak.infer, self.test_loader, num_classes)
        self.evaluations = {"test": test}
        val = None
        if self.val_loader is not None:
            val = self.team.evaluate(self.peak.infer, self.val_loader, num_classes)
            self.evaluations["val"] = val
        if not math.isfinite(test.loss):
            # The losses of the steps are those before each update: the last one can break it.
            raise UserError(
                f"the weights gave a test loss that is NaN or infinite after epoch {epoch}. "
                f"{self._what_is_kept()} Try a smaller --lr, or --precision fp32."
            )

        self.sums.load(self.team.total(self.sums.state()))
        losses, accuracies = self.sums.mean_loss(), self.sums.accuracy()
        row: Row = {
            "epoch": epoch,
            "train_loss": losses[0],
            "train_acc": accuracies[0],
            "test_loss": test.loss,
            "test_acc": test.accuracy,
            "images_per_second": self.sums.num_images / self.train_seconds,
            "step_time_ms": 1000 * self.train_seconds / len(self.train_loader),
        }
        for column, name in enumerate(self.learner.loss_names, start=1):
            row[f"{name}_loss"] = losses[column]
            if self.sums.has_logits:
                row[f"{name}_acc"] = accuracies[column]
        if val is not None:
            row["val_loss"], row["val_acc"] = val.loss, val.accuracy
        if self.settings.start_from is not None:
            for part, result in self.evaluations.items():
                row[f"{part}_balanced_acc"] = result.balanced_accuracy
            self._keep_best(epoch, row)

        # Nothing is chosen by the test set: a plateau is one of the validation or training loss.
        watched = losses[0] if val is None else val.loss
        for schedule in self.schedules.values():
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step(watched)
            else:
                schedule.step()

        self.rows.append(row)
        self.total_seconds += self.train_seconds
        self.epoch, self.step, self.train_seconds = epoch, 0, 0.0
        self.sums = self._new_sums()
        self._save()
        if self.team.is_first:
            with self.team.writing():
                self.run.write_metrics(self.rows)
        return row

    def _keep_best(self, epoch: int, row: Row) -> None:
        """With --keep best: hold on to the weights of the best balanced validation accuracy, the
        first of several alike. The test images have no say."""
        if self.settings.keep != "best":
            return
        value = row["val_balanced_acc"]
        if self.best is None or value > self.best["value"]:
            learner = self.learner
            modules = {"model": learner.model, "heads": learner.heads}
            self.best = {"epoch": epoch, "value": value} | {
                name: {key: t.detach().cpu().clone() for key, t in module.state_dict().items()}
                for name, module in modules.items()
            }

    def _finish_run(self) -> dict[str, Any]:
        self.learner.eval()
        if self.best is not None:
            self.learner.model.load_state_dict(self.best["model"])
            self.learner.heads.load_state_dict(self.best["heads"])
        self.team.collect_weights()
        summary = self._summary()
        if self.team.is_first:
            with self.team.writing():
                save_weights(self.run.model_path, self.learner, self.config)
                self.run.write_summary(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        settings, last = self.settings, self.rows[-1]
        if self.best is not None:
            last = self.rows[self.best["epoch"] - 1]
        test_accs = [row["test_acc"] for row in self.rows]
        summary = {
            "test_acc": last["test_acc"],
            "best_test_acc": max(test_accs),
            "test_loss": last["test_loss"],
            "train_acc": last["train_acc"],
            "train_loss": last["train_loss"],
            "test_acc_per_epoch": test_accs,
            "images_per_second": statistics.median(r["images_per_second"] for r in self.rows),
            "step_time_ms_median": statistics.median(r["step_time_ms"] for r in self.rows),
            "train_seconds": self.total_seconds,
            "epochs": len(self.rows),
            "rule": settings.rule,
            "basis": settings.basis,
            "setting": settings.setting,
            "model": settings.model,
            "dataset": settings.dataset,
            "seed": settings.seed,
            "num_params": sum(p.numel() for p in self.learner.model.parameters()),
            "num_additional_params": self.learner.num_additional_params,
            "device": settings.device,
            "device_name": self.config.environment["device_name"],
            "precision": settings.precision,
            "backend": settings.backend,
            "cuda_graph": isinstance(self._step, GraphedStep),
            "block_paths": self.learner.block_paths,
        }
        if "val_acc" in last:
            val_accs = [row["val_acc"] for row in self.rows]
            best = max(range(len(val_accs)), key=val_accs.__getitem__)
            summary |= {
                "val_acc": last["val_acc"],
                "best_val_acc": val_accs[best],
                "test_acc_at_best_val": test_accs[best],
            }
        if settings.start_from is not None:
            summary |= self._finetuning_summary(last)
        return summary

    def _finetuning_summary(self, last: Row) -> dict[str, Any]:
        names = self.config.class_names
        summary: dict[str, Any] = {
            "start_from": self.settings.start_from,
            "kept_epoch": last["epoch"],
            "trained_blocks": self.learner.block_names,
            **{name: last[name] for name in last if name.endswith("_balanced_acc")},
            "class_counts": class_counts(self._dataset),
            **self.peak.summary(),
        }
        skipped = self._front.skipped() if self._front else contextlib.nullcontext()
        with skipped:
            result = evaluate(self.learner, self.test_loader, len(names))
        accuracies = result.class_accuracy.tolist()
        summary["test_class_acc"] = dict(zip(names, accuracies, strict=True))
        return summary

    # -- parts ----------------------------------------------------------------------------------

    def _new_sums(self) -> EpochSums:
        names = self.learner.loss_names
        return EpochSums(names, self.device, is_whole=self.team.is_alone)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _snapshot(self) -> Snapshot:
        loss, accuracy, loads = self.team.progress(self.sums)
        return Snapshot(
            epoch=self.epoch + 1,
            num_epochs=self.num_epochs,
            step=self.step,
            num_steps=len(self.train_loader),
            loss=loss,
            accuracy=accuracy,
            images_per_second=self.sums.num_images / max(self.train_seconds, 1e-9),
            loads=loads,
        )

    def _check_losses(self) -> None:
        """Raises UserError where a loss since the last look was NaN or infinite."""
        if not self._unchecked:
            return
        losses = torch.stack(self._unchecked).cpu()
        first_step = self.step - len(self._unchecked) + 1
        self._unchecked.clear()
        if bool(torch.isfinite(losses).all()):
            return
        row, column = torch.nonzero(~torch.isfinite(losses))[0].tolist()
        names = ["the output", *(f"block {name}" for name in self.learner.loss_names)]
        # A block's loss is the cause of those after it, so the first block is named, and the
        # output (column 0) only where no block is to blame.
        bad = torch.nonzero(~torch.isfinite(losses[row, 1:]))
        column = 1 + int(bad[0]) if len(bad) else 0
        value = losses[row, column].item()
        raise UserError(
            f"the loss of {names[column]} became {'NaN' if math.isnan(value) else 'infinite'} at "
            f"step {first_step + row} of epoch {self.epoch + 1}. {self._what_is_kept()} "
            f"Try a smaller --lr, or --precision fp32."
        )

    def _what_is_kept(self) -> str:
        if not self.rows:  # a look at the disk would not tell: another process may write there
            return "No epoch was finished, so there is no checkpoint of one."
        return f"The last good checkpoint (epoch {len(self.rows)}) is kept in {self.run.path}."

    def _save(self) -> None:
        learner, sums = self.team.training_state(), self.team.total(self.sums.state())
        if not self.team.is_first:
            return
        state = {
            "config": self.config.to_json(),
            "epoch": self.epoch,
            "step": self.step,
            "rows": self.rows,
            "train_seconds": self.train_seconds,
            "total_seconds": self.total_seconds,
            "sums": sums,
            "learner": learner,
            "schedules": {name: s.state_dict() for name, s in self.schedules.items()},
            "best": self.best,
            "peak": self.peak.state(),
            "has_streams": self._streams is not None,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        with self.team.writing():
            save_checkpoint(self.run.checkpoint_path, state)

    def _load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
        self.train_seconds, self.total_seconds = state["train_seconds"], state["total_seconds"]
        self.sums.load(self.team.own_part(state["sums"]))
        self.team.load_training_state(state["learner"])
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        self.best = state.get("best")  # of earlier versions there is none
        self.peak.load(state.get("peak"))
        torch.set_rng_state(state["rng"])
        if self.step and self._streams is not None and not state.get("has_streams", False):
            self.observer.on_note(
                "the checkpoint is from the middle of an epoch and of an earlier version, which "
                "drew dropout's masks otherwise: the run goes on, but not bit for bit"
            )
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])


def _read_run(run: RunDirectory, given: dict[str, Any]) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config and the checkpoint of a run; None where it has none yet."""
    config = check_same_settings(run, given)
    has_checkpoint = run.checkpoint_path.exists()
    return config, load_checkpoint(run.checkpoint_path) if has_checkpoint else None


def _facts(config: RunConfig, environment: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must be the same wherever a part of the run is trained, by what the user calls it.

    Arguments:
        config: of the run.
        environment: of this process, where it is not the config's own.
    """
    environment = config.environment if environment is None else environment
    settings = {
        "the model's file" if name == "model_digest" else flag(name): value
        for name, value in config.settings.to_json().items()
        if name not in _PLACES
    }
    return {
        **settings,
        "locallearn": environment["locallearn"],
        "python": environment["python"],
        **environment["packages"],
        "the device": environment["device_name"],
        # Its vector instructions, which say how sums are made.
        "the CPU's instructions": torch.backends.cpu.get_cpu_capability(),
        "the data": config.data["fingerprint"],
        "the classes": list(config.class_names),
    }


def _random_streams(
    settings: TrainConfig, learner: LocalLearner, team: Team
) -> RandomStreams | None:
    """Of a network that may draw random numbers in training."""
    if not is_foreign(settings.model) and not settings.dropout:
        return None
    is_local = isinstance(learner.rule, LocalRule)
    return RandomStreams(
        learner.model if is_local else None,
        [unit.modules[0] for unit in learner.units] if is_local else [],
        seed=settings.seed,
        replica=team.replica,
        device=torch.device(settings.device),
    )


def check_same_settings(run: RunDirectory, given: dict[str, Any]) -> RunConfig:
    """The run's config, if the given settings are its own (``data_dir`` and ``cache`` may differ).

    Raises:
        UserError: names those that are not.
    """
    config = run.read_config()
    repeated = {name: value for name, value in given.items() if name not in _PLACES}
    differing = differing_settings(config.settings, repeated)
    if differing:
        raise UserError(
            f"{run.path} was made with other settings: {', '.join(differing)}. "
            f"Leave them out to resume it, or start a new run with --out."
        )
    return config


def _environment(settings: TrainConfig) -> dict[str, Any]:
    """Of a run, the package that its rule comes from included."""
    package = rule_package(settings.build_rule().name)
    return describe_environment(settings.device, *([package] if package else []))


def _tensorboard_tag(column: str) -> str:
    """The column "test_acc" as "test/acc": TensorBoard groups by what stands before the slash."""
    group, _, quantity = column.rpartition("_")
    return f"{group}/{quantity}" if quantity in ("loss", "acc") else f"speed/{column}"
