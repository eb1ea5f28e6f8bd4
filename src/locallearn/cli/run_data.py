"""The weights and the data of a run that is over."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from locallearn.cli.console import make_observer
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.data import Dataset
    from locallearn.engine import Trained


def load_run(run: str) -> Trained:
    """The run with its weights, which are put into its model built anew.

    A note goes to standard error where a file builds the model, and has changed since.

    Raises:
        UserError: no run, or a model that can't be built, or that the weights do not fit.
    """
    from locallearn.engine import load_trained
    from locallearn.engine.building import changed_file

    trained = load_trained(Path(run))
    if change := changed_file(trained.config.settings):
        print(f"note: {change}: these are its weights in the model as it is now", file=sys.stderr)
    return trained


def load_run_data(trained: Trained, data_dir: str | None, cache: str | None) -> Dataset:
    """The run's data, seen as the run's network was trained to see it.

    Arguments:
        trained: the run.
        data_dir: where the data is now; where it was, if None.
        cache: where decoded images are kept, instead of the run's; empty for nowhere.

    Raises:
        UserError: other classes, or images of another shape, than the run's.
    """
    from locallearn.engine.building import load_data

    config = trained.config
    in_memory = config.data["in_memory"] if data_dir is None else None
    dataset = load_data(
        config.settings,
        data_dir=data_dir,
        cache=cache,
        in_memory=in_memory,
        view=config.inputs,
        listener=make_observer(quiet=False),
    )
    if dataset.class_names != config.class_names:
        raise UserError(
            f"the data has other classes than the network was trained on: "
            f"{', '.join(dataset.class_names)} instead of {', '.join(config.class_names)}."
        )
    for what in ("num_channels", "image_size", "resize"):
        ours, theirs = getattr(config.inputs, what), getattr(dataset.inputs, what)
        if ours != theirs:
            raise UserError(
                f"the data has {what} {theirs}, the network was trained with {ours}. Give data "
                f"like that it was trained on; `predict` takes images of any size."
            )
    return replace(dataset, inputs=config.inputs)
