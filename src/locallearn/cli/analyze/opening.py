"""What the subcommands of `locallearn analyze` share: their options, the run, the files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locallearn.cli.command import running_command
from locallearn.cli.run_data import load_run, load_run_data
from locallearn.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from locallearn.analysis.latents import BlockView
    from locallearn.data import Dataset, ImageLoader
    from locallearn.engine import LocalLearner, TrainConfig, Trained

RunArgument = Annotated[str, typer.Argument(help="Run directory.", metavar="RUN")]
BlockOption = Annotated[
    str | None, typer.Option(help="Block of the network.", show_default=False, metavar="NAME")
]
OutOption = Annotated[
    str | None,
    typer.Option(help="Directory to write to. Default: RUN/figures.", show_default=False),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Use so many test images at most.", show_default=False)
]
SeedOption = Annotated[
    int, typer.Option(help="Of whatever is drawn at random.", min=0, max=2**32 - 1)
]


@dataclass(frozen=True)
class Opened:
    """A run whose weights are loaded.

    Arguments:
        run: as the user gave it.
        trained: its learner is on ``device``.
        device: where it infers.
    """

    run: str
    trained: Trained
    device: torch.device

    @property
    def settings(self) -> TrainConfig:
        return self.trained.config.settings

    @property
    def learner(self) -> LocalLearner:
        return self.trained.learner

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.trained.config.class_names

    @property
    def title(self) -> str:
        """The run in a few words."""
        from locallearn.engine.config import data_name, model_name

        return f"{model_name(self.settings)}, {self.settings.rule}, {data_name(self.settings)}"

    @property
    def num_epochs(self) -> int:
        """Finished epochs."""
        if self.trained.num_epochs is not None:
            return self.trained.num_epochs
        assert self.settings.epochs is not None  # the weights' own file is of a finished run
        return self.settings.epochs

    def views(self, learner: LocalLearner | None = None) -> list[BlockView]:
        """The blocks, and what a head reads of them.

        Arguments:
            learner: another one that is built alike; the run's own where None.
        """
        from locallearn.analysis.latents import block_views

        return block_views(learner or self.learner, head_after_pool=self.settings.head_after_pool)

    def example_input(self) -> Tensor:
        """Two images of nothing, as the network sees them."""
        import torch

        inputs = self.trained.config.inputs
        return torch.zeros(2, inputs.num_channels, *inputs.image_size, device=self.device)

    def load_data(self, data_dir: str | None, cache: str | None, limit: int | None) -> Dataset:
        """The run's data, with so many test images at most; BatchNorm's statistics fit after it."""
        from locallearn.analysis.latents import limited

        if limit is not None and limit < 1:
            raise UserError(f"--limit must be at least 1, got {limit}.")
        dataset = load_run_data(self.trained, data_dir, cache)
        if self.trained.needs_recalibration:
            self.recalibrate(self.learner, dataset)
        return limited(dataset, limit)

    def recalibrate(self, learner: LocalLearner, dataset: Dataset) -> None:
        """Re-estimate BatchNorm's statistics as the training loop does before an evaluation."""
        from locallearn.engine.building import recalibrate, training_loader

        # The run's own backend may be of another device; what it makes of the images is the same.
        settings = replace(self.settings, backend="reference")
        recalibrate(learner, training_loader(settings, dataset, self.device))

    def test_loader(self, dataset: Dataset, batch_size: int) -> ImageLoader:
        """The test images in their own order."""
        from locallearn.engine.building import evaluation_loader

        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {batch_size}.")
        return evaluation_loader(dataset.test, dataset, batch_size, self.device)


def open_run(run: str, device: str) -> Opened:
    """Raises UserError where there is no run directory with weights."""
    import torch

    from locallearn.engine import RunDirectory, choose_device

    place = torch.device(choose_device(device))
    RunDirectory(Path(run)).read_config()
    trained = load_run(run)
    trained.learner.to(place)
    return Opened(run, trained, place)


def figure_directory(run: str, out: str | None) -> Path:
    """Where the figures go. Raises UserError where that is no directory, nor can become one."""
    directory = Path(run) / "figures" if out is None else Path(out)
    if out == "":
        raise UserError("--out is empty; give a directory, or leave it out.")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file; give a directory.")
    return directory


def write_figure(
    opened: Opened,
    directory: Path,
    name: str,
    figure: Any,
    caption: str,
    numbers: dict[str, Any],
) -> None:
    """NAME.png, NAME.svg, and NAME.json, which says what they show; and print where they are."""
    from locallearn.analysis.figures.drawing import written
    from locallearn.engine.environment import describe_environment
    from locallearn.engine.files import write_atomically, write_json

    directory.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        target = directory / f"{name}{suffix}"
        write_atomically(target, written(figure, target))
    write_json(
        directory / f"{name}.json",
        {
            "figure": name,
            "caption": caption,
            "command": running_command(),
            "numbers": numbers,
            "epochs": opened.num_epochs,
            "environment": describe_environment(opened.device.type),
        },
    )
    print(f"written to {directory / name}.png, .svg and .json")


def class_numbers(names: tuple[str, ...], given: str) -> list[int]:
    """Label numbers of classes by name or number, separated by commas.

    Raises:
        UserError: one that the run does not have; names those it has.
    """
    numbers = []
    for part in (part.strip() for part in given.split(",")):
        if part in names:
            numbers.append(names.index(part))
        elif part.isascii() and part.isdigit() and int(part) < len(names):
            numbers.append(int(part))
        else:
            raise UserError(
                f"unknown class {part!r}. The run's classes, by name or number from 0: "
                f"{', '.join(names)}."
            )
    return list(dict.fromkeys(numbers))


def check_every_class(
    names: tuple[str, ...], counts: Tensor, *, only_correct: bool = False
) -> None:
    """Raises UserError where a class has no image to take the mean of.

    Arguments:
        names: K classes.
        counts: (K,), images of each.
        only_correct: whether those were counted alone that are classified rightly.
    """
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if missing and only_correct:
        raise UserError(
            f"no test image is classified rightly as: {', '.join(missing)}. Use --images all, or "
            f"a run that was trained for longer."
        )
    if missing:
        raise UserError(
            f"there is no test image of: {', '.join(missing)}. Use a larger --limit, or none."
        )
