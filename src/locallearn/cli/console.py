"""What training looks like: a live bar on a terminal, plain lines elsewhere, or silence."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from locallearn.data import Work
    from locallearn.engine import LocalLearner, Row, RunConfig, RunDirectory, Snapshot

_REFRESH_SECONDS = 0.2


class QuietObserver:
    """Says nothing; the other observers refine it."""

    def on_work(self, work: Work) -> None:
        pass

    def on_work_progress(self, done: int) -> None:
        pass

    def on_work_end(self, error: BaseException | None) -> None:
        pass

    def on_start(self, config: RunConfig, learner: LocalLearner, run: RunDirectory) -> None:
        pass

    def on_note(self, text: str) -> None:
        pass

    def wants_progress(self) -> bool:
        return False

    def on_progress(self, snapshot: Snapshot) -> None:
        pass

    def on_evaluation(self, epoch: int) -> None:
        pass

    def on_epoch(self, row: Row, num_epochs: int) -> None:
        pass

    def close(self) -> None:
        pass


class PlainObserver(QuietObserver):
    """A line for each work on the data, for the start, for each note and for each epoch."""

    _verb = ""

    def on_work(self, work: Work) -> None:
        self._verb = work.verb
        self.print(work_line(work))

    def on_work_end(self, error: BaseException | None) -> None:
        if self._verb == "downloading" and isinstance(error, KeyboardInterrupt):
            self.print("stopped: what has come is kept, and the next start goes on from there")

    def on_start(self, config: RunConfig, learner: LocalLearner, run: RunDirectory) -> None:
        for line in start_lines(config, learner, run.path):
            self.print(line)

    def on_note(self, text: str) -> None:
        self.print(f"note: {text}")

    def on_epoch(self, row: Row, num_epochs: int) -> None:
        self.print(epoch_line(row, num_epochs))

    def print(self, line: str) -> None:
        print(line, flush=True)


class TerminalObserver(PlainObserver):
    """Plain lines above a live bar for the epoch."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            refresh_per_second=1 / _REFRESH_SECONDS,
        )
        self._task: Any = None
        self._last = 0.0
        self._work: Progress | None = None

    def on_work(self, work: Work) -> None:
        super().on_work(work)
        figures: list[ProgressColumn] = [MofNCompleteColumn()]
        if work.unit == "bytes":
            figures = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        self._work = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            *figures,
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._progress.console,
            transient=True,
            refresh_per_second=1 / _REFRESH_SECONDS,
        )
        self._work.add_task(work.verb, total=work.total, completed=work.begun)
        self._work.start()

    def on_work_progress(self, done: int) -> None:
        now = time.monotonic()
        # Unpacking tells of each of 120,000 files.
        if self._work is not None and now - self._last >= _REFRESH_SECONDS:
            self._last = now
            self._work.update(self._work.task_ids[0], completed=done)

    def on_work_end(self, error: BaseException | None) -> None:
        if self._work is not None:
            self._work.stop()
            self._work = None
        super().on_work_end(error)

    def on_start(self, config: RunConfig, learner: LocalLearner, run: RunDirectory) -> None:
        super().on_start(config, learner, run)
        self._progress.start()
        self._task = self._progress.add_task("starting", total=None, figures="")

    def wants_progress(self) -> bool:
        now = time.monotonic()
        if now - self._last < _REFRESH_SECONDS:
            return False
        self._last = now
        return True

    def on_progress(self, snapshot: Snapshot) -> None:
        done = (snapshot.epoch - 1) * snapshot.num_steps + snapshot.step
        self._progress.update(
            self._task,
            description=f"epoch {snapshot.epoch}/{snapshot.num_epochs}",
            completed=done,
            total=snapshot.num_epochs * snapshot.num_steps,
            figures=f"loss {snapshot.loss:.3f}  acc {snapshot.accuracy:5.2f} %  "
            f"{snapshot.images_per_second:,.0f} images/s{_loads(snapshot)}",
        )

    def on_evaluation(self, epoch: int) -> None:
        self._progress.update(self._task, description=f"testing after epoch {epoch}")

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _loads(snapshot: Snapshot) -> str:
    """Of several processes, by rank, how much of the time each has work."""
    percents = " ".join(f"{100 * load:.0f}" for load in snapshot.loads)
    return f"  load {percents} %" if percents else ""


def make_observer(*, quiet: bool) -> QuietObserver:
    """The observer that fits where standard output goes."""
    if quiet:
        return QuietObserver()
    console = Console(file=sys.stdout)
    return TerminalObserver(console) if console.is_terminal else PlainObserver()


def work_line(work: Work) -> str:
    """What a work on the data is: "downloading a.zip (237 MiB) from http://... to /data"."""
    from locallearn.data.listening import readable_size  # not above: it would wait for torch

    size = f" ({readable_size(work.total)})" if work.unit == "bytes" else ""
    begun = f", {readable_size(work.begun)} of it there already" if work.begun else ""
    origin = f" from {work.origin}" if work.origin else ""
    target = f" to {work.target}" if work.target else ""
    return f"{work.verb} {work.what}{size}{origin}{target}{begun}"


def start_lines(config: RunConfig, learner: LocalLearner, path: Path) -> list[str]:
    """What is about to happen."""
    s, data = config.settings, config.data
    height, width = config.inputs.image_size
    held_out = f", {data['num_val']:,} held out" if data["num_val"] else ""
    basis = f", {s.basis} basis ({s.setting})" if s.basis else ""
    num_params = sum(p.numel() for p in learner.model.parameters())
    more = learner.num_additional_params
    rate = next(iter(learner.optimizers.values())).param_groups[0]["lr"]
    additional = f" + {more:,} of the rule" if more else ""
    return [
        f"data     {s.dataset}: {data['num_train']:,} training images{held_out}, "
        f"{data['num_test']:,} test images, {len(config.class_names)} classes, "
        f"{config.inputs.num_channels}x{height}x{width}, augmentation: {data['augmentation']}",
        f"model    {s.model}: {num_params:,} parameters{additional}",
        f"rule     {s.build_rule().name}{basis}{_chosen(config)}",
        f"training {s.epochs} epochs, batch {s.batch_size}, {s.optimizer}, lr {rate:g}, "
        f"{s.precision} on {s.device} ({config.environment['device_name']})",
        f"update   {_update(config, learner)}",
        f"run      {path}",
    ]


def _chosen(config: RunConfig) -> str:
    """Options of the rule, and of what its heads read, that are not the defaults."""
    from locallearn.engine.config import rule_options

    chosen = rule_options(config.settings)
    return "".join(
        f", {name.replace('_', '-')} {'yes' if value is True else value}"
        for name, value in chosen.items()
    )


def _update(config: RunConfig, learner: LocalLearner) -> str:
    """How blocks are updated, and who chose it."""
    from locallearn.rules import Requirement

    backend = config.settings.backend
    paths = list(learner.block_paths.values())
    if learner.rule.requires is Requirement.END_TO_END:
        return f"backpropagation; the optimizer's step by backend {backend}"
    if learner.rule.requires is Requirement.GLOBAL_ERROR:
        return "autograd in each block, once the output's error is known"
    if learner.rule.requires is Requirement.TWO_FORWARDS:
        return "layer by layer, in a second forward"
    closed = paths.count("closed form")
    how = "autograd in each block"
    if closed:
        how = f"closed form in {closed} of {len(paths)} blocks, backend {backend}"
    return f"{how} ({config.data['backend_reason']})"


def epoch_line(row: Row, num_epochs: int) -> str:
    """One epoch's figures, each block's own accuracy among them."""
    width = len(str(num_epochs))
    line = (
        f"epoch {row['epoch']:{width}}/{num_epochs}  loss {row['train_loss']:.4f}  "
        f"train {row['train_acc']:6.2f} %  test {row['test_acc']:6.2f} %"
    )
    if "val_acc" in row:
        line += f"  val {row['val_acc']:6.2f} %"
    if "val_balanced_acc" in row:
        line += f" (balanced {row['val_balanced_acc']:.2f} %)"
    line += f"  {row['images_per_second']:,.0f} images/s"
    from locallearn.engine.run import NETWORK_COLUMNS

    not_blocks = {f"{name}_acc" for name in NETWORK_COLUMNS}
    blocks = [v for name, v in row.items() if name.endswith("_acc") and name not in not_blocks]
    if blocks:
        line += "  blocks " + " ".join(f"{value:.1f}" for value in blocks)
    return line
