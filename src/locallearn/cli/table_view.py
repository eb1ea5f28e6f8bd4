"""What `locallearn reproduce` shows: the whole table, live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from locallearn.analysis import MeanStd
from locallearn.engine import RunDirectory, Snapshot
from locallearn.errors import UserError
from locallearn.recipes import (
    Busy,
    Cell,
    CellState,
    EpochDone,
    Failed,
    Finished,
    Message,
    Noted,
    Outcome,
    Plan,
    RowResult,
    Started,
    Stopped,
    collect,
    rehearsal_lines,
    remarks,
    say_runs,
    write_table,
)

_REFRESH_SECONDS = 0.25
_FILE_WIDTH = 120  # characters, where there is no terminal to be as wide as
_MINUTE = 60  # seconds
_MINUTES_OF_AN_HOUR = 60


class CellView:
    """Where one run is."""

    def __init__(self, cell: Cell) -> None:
        self.state = cell.state()
        self.is_running = False
        self.error: str | None = None
        self.doing = ""
        self.test_acc: float | None = None
        assert cell.settings.epochs is not None
        self.num_epochs = cell.settings.epochs
        self.epochs_done = 0.0  # with the part of the one that goes on
        if self.state is CellState.DONE:
            summary = RunDirectory(cell.path).read_summary()
            assert summary is not None
            self.finish(summary["test_acc"])

    def finish(self, test_acc: float) -> None:
        self.state, self.is_running = CellState.DONE, False
        self.test_acc, self.epochs_done = test_acc, self.num_epochs

    def text(self) -> Text:
        """In a few characters."""
        if self.error is not None:
            return Text("failed", style="bold red")
        if self.state is CellState.DONE:
            return Text(f"{self.test_acc:.2f}", style="green")
        if self.is_running:
            return Text(f"{100 * self.epochs_done / self.num_epochs:3.0f} %", style="bold yellow")
        return Text("paused" if self.state is CellState.STARTED else "·", style="dim")


class TableView:
    """Keeps where each run is; the terminal's and the plain view refine it."""

    def __init__(self, plan: Plan, num_jobs: int) -> None:
        self.plan = plan
        self.num_jobs = num_jobs
        self.cells = {cell: CellView(cell) for cell in plan.cells}
        self.began = time.monotonic()
        self._epoch_began: dict[Cell, float] = {}
        self._seconds_per_epoch: dict[str, list[float]] = {}

    # -- told by the runs -------------------------------------------------------------------

    def on_begin(self, cell: Cell) -> None:
        view = self.cells[cell]
        view.is_running, view.doing = True, "starting"

    def on_message(self, cell: Cell, message: Message) -> None:
        view = self.cells[cell]
        if isinstance(message, Started):
            view.state, view.epochs_done = CellState.STARTED, message.epoch
            self._epoch_began[cell] = time.monotonic()
        elif isinstance(message, Busy):
            view.doing = message.text
        elif isinstance(message, Noted):
            self.note(f"{cell.name}: {message.text}")
        elif isinstance(message, Snapshot):
            view.epochs_done = message.epoch - 1 + message.step / message.num_steps
            view.doing = (
                f"epoch {message.epoch}/{message.num_epochs}, loss {message.loss:.3f}, "
                f"{message.accuracy:.1f} % of training images, "
                f"{message.images_per_second:,.0f} images/s"
            )
        elif isinstance(message, EpochDone):
            now = time.monotonic()
            spent = now - self._epoch_began[cell]
            self._seconds_per_epoch.setdefault(_kind(cell), []).append(spent)
            self._epoch_began[cell] = now
            view.test_acc, view.epochs_done = message.row["test_acc"], message.row["epoch"]

    def on_end(self, cell: Cell, outcome: Outcome) -> None:
        view = self.cells[cell]
        view.is_running = False
        if isinstance(outcome, Finished):
            view.finish(outcome.summary["test_acc"])
        elif isinstance(outcome, Failed):
            view.error = outcome.message
        self.note(self._end_line(cell, outcome))
        try:
            self.write()
        except (OSError, UserError) as error:  # the runs go on; it is written again at the end
            self.note(f"the table can't be written: {error}")

    def on_stopping(self) -> None:
        self.note("stopping: the runs save themselves; a second time ends them at once")

    def on_tick(self) -> None:
        pass

    # -- for the command ---------------------------------------------------------------------

    def write(self) -> list[Path]:
        """The result as it is now."""
        return write_table(self.plan, collect(self.plan))

    def finish(self) -> list[Path]:
        """Write the result, and print accuracy and cost of each row. Returns the files' paths."""
        rows = collect(self.plan)
        paths = write_table(self.plan, rows)
        console = Console(file=sys.stdout, highlight=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        for remark in remarks(self.plan, rows):
            console.print(remark, markup=False, soft_wrap=True)
        console.print(_result_table(self.plan, rows))
        return paths

    def note(self, line: str) -> None:
        print(line, flush=True)

    def seconds_left(self) -> float | None:
        """By the epochs of like runs; None before the first epoch of any."""
        everything = [s for each in self._seconds_per_epoch.values() for s in each]
        if not everything:
            return None
        total, num_open = 0.0, 0
        for cell, view in self.cells.items():
            if view.error is None and view.epochs_done < view.num_epochs:
                own = self._seconds_per_epoch.get(_kind(cell)) or everything
                total += (view.num_epochs - view.epochs_done) * sum(own) / len(own)
                num_open += 1
        return total / max(1, min(self.num_jobs, num_open))

    def summary_line(self) -> str:
        """How much is done, for how long, and how long it will take."""
        views = self.cells.values()
        done = sum(view.state is CellState.DONE for view in views)
        line = f"{done} of {len(views)} runs done, {say_seconds(time.monotonic() - self.began)}"
        failed = sum(view.error is not None for view in views)
        if failed:
            line += f", {failed} failed"
        left = self.seconds_left()
        if left is not None and done + failed < len(views):
            line += f", about {say_seconds(left)} left"
        return line

    def _end_line(self, cell: Cell, outcome: Outcome) -> str:
        number = sum(view.state is CellState.DONE for view in self.cells.values())
        place = f"[{number}/{len(self.cells)}] {cell.name}"
        if isinstance(outcome, Finished):
            found = outcome.summary
            return (
                f"{place}: {found['test_acc']:.2f} % (best {found['best_test_acc']:.2f} %) after "
                f"{found['epochs']} epochs, {found['step_time_ms_median']:.1f} ms a step"
            )
        return f"{place}: {'stopped' if isinstance(outcome, Stopped) else outcome.message}"


class TerminalTableView(TableView):
    """The table, drawn anew a few times a second."""

    def __init__(self, plan: Plan, num_jobs: int) -> None:
        super().__init__(plan, num_jobs)
        self.console = Console(file=sys.stdout, highlight=False)
        self._last = 0.0
        self._marks = [Text(f"rehearsal: {each}", style="dim") for each in rehearsal_lines(plan)]
        self.live = Live(
            self.render(), console=self.console, auto_refresh=False, vertical_overflow="crop"
        )

    def on_tick(self) -> None:
        now = time.monotonic()
        if now - self._last >= _REFRESH_SECONDS:
            self._last = now
            self.live.update(self.render(), refresh=True)

    def note(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)
        self.live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        running = [(cell, view) for cell, view in self.cells.items() if view.is_running]
        lines = [
            Text(f"{cell.name}: {view.doing}", no_wrap=True, overflow="ellipsis")
            for cell, view in running
        ]
        # Where the terminal is too low for all rows, those around the first running one.
        room = self.console.height - len(lines) - len(self._marks) - 6
        names = [recipe.name for recipe in self.plan.table.recipes]
        first = 0
        if len(names) > room > 0:
            at = names.index(running[0][0].recipe.name) if running else 0
            first = max(0, min(at - room // 2, len(names) - room))
        shown = self.plan.table.recipes[first : first + room] if room > 0 else ()
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        table.add_column("recipe", no_wrap=True)
        num_seeds = max(len(self.plan.of(recipe)) for recipe in self.plan.table.recipes)
        for seed in range(num_seeds):
            table.add_column("seeds" if seed == 0 else "", justify="right", no_wrap=True)
        table.add_column("mean ± std", justify="right", no_wrap=True)
        for recipe in shown:
            views = [self.cells[cell] for cell in self.plan.of(recipe)]
            texts = [view.text() for view in views]
            found = [v.test_acc for v in views if v.state is CellState.DONE]
            values = [value for value in found if value is not None]
            mean = str(MeanStd.of(values)) if values else ""
            table.add_row(recipe.name, *texts, *[""] * (num_seeds - len(texts)), mean)
        hidden = len(names) - len(shown)
        more = [Text(f"and {hidden} more", style="dim")] if hidden else []
        return Group(
            *self._marks, table, *more, Text(""), *lines, Text(self.summary_line(), style="bold")
        )


@contextmanager
def make_view(plan: Plan, num_jobs: int) -> Iterator[TableView]:
    """The view that fits where standard output goes."""
    if not Console(file=sys.stdout).is_terminal:
        for line in rehearsal_lines(plan):
            print(f"rehearsal: {line}", flush=True)
        yield TableView(plan, num_jobs)
        return
    view = TerminalTableView(plan, num_jobs)
    with view.live:
        try:
            yield view
        finally:
            view.live.update(view.render(), refresh=True)


def say_seconds(seconds: float) -> str:
    """A duration for people: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    if minutes < 2 * _MINUTES_OF_AN_HOUR:
        return f"{minutes} min"
    hours, rest = divmod(minutes, _MINUTES_OF_AN_HOUR)
    return f"{hours} h {rest:02} min"


def _kind(cell: Cell) -> str:
    """Runs that take about the same time have the same."""
    settings = cell.settings
    return f"{settings.model} {settings.dataset} {settings.rule}"


def _result_table(plan: Plan, rows: list[RowResult]) -> Table:
    table = Table(
        title=plan.table.title, title_justify="left", box=None, pad_edge=False, padding=(0, 1)
    )
    table.add_column("recipe", no_wrap=True)
    headings = ("accuracy %", "best %", "runs", "signal kMAC", "step MMAC", "peak MiB", "ms a step")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cost = row.cost
        table.add_row(
            row.recipe.name,
            "-" if row.test_acc is None else str(row.test_acc),
            "-" if row.best_test_acc is None else str(row.best_test_acc),
            say_runs(row),
            _number(None if cost is None else cost.learning_signal_macs / 1e3),
            _number(None if cost is None else cost.total_macs / 1e6),
            _number(row.peak_activation_mib),
            _number(row.step_time_ms),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
