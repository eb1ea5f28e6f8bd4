"""What a fine-tuning is run with, where the user does not say: made for few images.

Shapes: K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from locallearn.data import SILENT, DataListener, Dataset
from locallearn.engine.building import check_model, load_data
from locallearn.engine.config import TrainConfig, rule_option_names
from locallearn.engine.finetuning.fitting import Fit, fit_to_limit
from locallearn.engine.finetuning.source import Start
from locallearn.engine.optimizers import usual_optimizer
from locallearn.errors import UserError

VAL_SPLIT = 0.2
BATCH_SIZE = 32
AUGMENTATION = "basic"
# Some hundreds of steps: enough for a new output layer, whatever the number of images.
NUM_STEPS = 400
MIN_EPOCHS, MAX_EPOCHS = 5, 100
# Of the largest class to the smallest, above which classes are balanced.
IMBALANCE = 1.5
BALANCES = ("auto", "on", "off")

# Of a network with BatchNorm that has learned already. The first was measured (docs/finetune.md),
# the others are as far below the usual ones as it is.
LEARNING_RATES = {
    "schedulefree-adamw": 1e-3,
    "schedulefree-sgd": 0.2,
    "adamw": 2e-4,
    "adam": 2e-4,
    "sgd": 0.01,
}


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning that is planned.

    Arguments:
        start: where the weights come from.
        settings: of the run, resolved.
        dataset: its data.
        record: what config.json keeps of the plan, plain JSON.
        notes: what the user should know, a line each.
        fit: what was chosen to fit the limit; None where there is none.
    """

    start: Start
    settings: TrainConfig
    dataset: Dataset
    record: dict[str, Any]
    notes: tuple[str, ...]
    fit: Fit | None


def plan_finetuning(
    start: Start,
    given: Mapping[str, Any],
    *,
    balance: str = "auto",
    listener: DataListener = SILENT,
) -> FineTuning:
    """Fill in what is not given, by the data and by the memory limit.

    Arguments:
        start: as :func:`read_source` yields it.
        given: settings by name, as the user chose them; `TrainConfig` has their names.
        balance: on, off, or auto: where the largest class has over 1.5 times the images of the
            smallest.
        listener: is told of what takes long.

    Raises:
        UserError: settings, data or a limit that will not do.
    """
    if balance not in BALANCES:
        raise UserError(f"unknown --balance {balance!r}. Valid: {', '.join(BALANCES)}.")
    rule = TrainConfig(**{"rule": start.settings["rule"], **_only(given, "rule")}).build_rule()
    optimizer, _ = usual_optimizer(rule, given.get("optimizer"))
    usual: dict[str, Any] = {
        "dataset": "folder",
        "augment": AUGMENTATION,
        "val_split": VAL_SPLIT,
        "optimizer": optimizer,
        "lr": LEARNING_RATES.get(optimizer) if _has_trained_norms(start) else None,
        "batch_size": BATCH_SIZE,
        "epochs": 1,  # until the number of images is known
    }
    chosen = {**usual, **start.settings, **given}
    chosen |= {"start_from": start.text, "start_digest": start.digest}
    if chosen.get("feature_cache") and chosen.get("cache_views", 1) == 1:
        if given.get("augment", "none") != "none":
            raise UserError(
                f"--cache keeps one copy of each training image, which is not augmented; --augment "
                f"{given['augment']} needs several: give --cache-views 4, or leave --augment out."
            )
        chosen["augment"] = "none"
    if "rule" in given:  # options of the source's own rule would not be of this one
        chosen |= {name: given.get(name) for name in rule_option_names()}
    settings = TrainConfig(**chosen).resolve()
    check_model(settings)
    dataset = load_data(settings, view=start.inputs, listener=listener)
    counts = class_counts(dataset)
    _check_counts(counts["train"])
    if balance == "auto":
        balance = "on" if is_imbalanced(list(counts["train"].values())) else "off"
    num_train = len(dataset.train)
    settings = replace(settings, balance=balance)
    if num_train < settings.batch_size:
        if "batch_size" in given:
            raise UserError(
                f"--batch-size {settings.batch_size} is more than the {num_train} training images "
                f"there are. Give a smaller one."
            )
        settings = replace(settings, batch_size=num_train)
    fit = None
    notes = list(start.notes)
    if settings.memory_limit is not None:
        fit = fit_to_limit(settings, dataset, given)
        settings = replace(settings, **fit.settings)
    if "epochs" not in given:
        settings = replace(settings, epochs=usual_epochs(num_train, settings.batch_size))
    if settings.feature_cache is not None and settings.cache_views == 1:
        notes.append(
            "--cache keeps what the frozen blocks make of each training image once, without "
            "augmentation; --cache-views 4 keeps four augmented copies of each"
        )
    if settings.feature_cache is None and settings.cache_views > 1:
        raise UserError("--cache-views says how many copies --cache keeps; give --cache, too.")
    record = {
        "class_counts": counts,
        "largest_to_smallest": imbalance(list(counts["train"].values())),
        "notes": notes,
        "fit": None if fit is None else fit.to_json(),
    }
    return FineTuning(start, settings.resolve(), dataset, record, tuple(notes), fit)


def _has_trained_norms(start: Start) -> bool:
    """Whether it has weights, and BatchNorm among them. Fresh weights are trained as ever, and
    for networks without BatchNorm the learner knows a lower learning rate."""
    return any(name.endswith(".running_var") for name in start.tensors)


def _only(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: given[name]} if name in given else {}


def usual_epochs(num_images: int, batch_size: int) -> int:
    """As many as make some 400 steps, within 5 and 100."""
    num_steps = max(1, math.ceil(num_images / batch_size))
    return min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(NUM_STEPS / num_steps)))


def class_counts(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Images of each class, by part and class name."""
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {
        part: dict(zip(dataset.class_names, _counts(source.labels, dataset), strict=True))
        for part, source in parts.items()
        if source is not None
    }


def imbalance(counts: list[int]) -> float:
    """The largest class's images by the smallest's."""
    return max(counts) / min(counts)


def is_imbalanced(counts: list[int]) -> bool:
    """Whether classes differ so much that showing them equally often matters."""
    return imbalance(counts) > IMBALANCE


def _counts(labels: Tensor, dataset: Dataset) -> list[int]:
    counts: list[int] = torch.bincount(labels.cpu(), minlength=dataset.num_classes).tolist()
    return counts


def _check_counts(counts: Mapping[str, int]) -> None:
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise UserError(
            f"class {empty[0]!r} has no training image left: those it has went to the test and "
            f"validation parts, or --limit-train left it out. Add images of it."
        )
