"""A run directory: what it holds, and how it is made, opened and written.

    config.json        every setting, the data's description, versions, device, commit
    checkpoint.pt      all that training needs to go on, exactly; written each epoch
    metrics.csv        a row an epoch
    tensorboard/       the same as TensorBoard events
    model.safetensors  the trained weights, at the end
    summary.json       the results, at the very end: its presence means "finished"
    exits.json         temperatures of the early exits, once `evaluate --early-exit` has fitted them

The checkpoint holds the rows so far, and metrics.csv is written anew from them each epoch: after
a kill at any moment the two agree as soon as the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from locallearn.data import InputSpec
from locallearn.engine.config import TrainConfig
from locallearn.engine.files import write_atomically, write_json
from locallearn.errors import UserError

FORMAT = "locallearn-run"
FORMAT_VERSION = 1

Row = dict[str, float | int]
Column = tuple[float | None, ...]

# Columns of metrics.csv that every run has.
_NEEDED = ("epoch", "train_acc", "test_acc", "images_per_second")
# Whose accuracies are the network's, and no block's.
NETWORK_COLUMNS = ("train", "test", "val", "test_balanced", "val_balanced")

# A zip archive ends with a directory that starts so: a truncated checkpoint has none.
_ZIP_END, _ZIP_END_REACH = b"PK\5\6", 4096


@dataclass(frozen=True)
class RunConfig:
    """What config.json holds.

    Arguments:
        settings: resolved.
        inputs: what the network sees of an image.
        class_names: in label order.
        data: further facts of the data: sizes, fingerprint, augmentation.
        environment: versions, device, commit, when.
    """

    settings: TrainConfig
    inputs: InputSpec
    class_names: tuple[str, ...]
    data: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": self.settings.to_json(),
            "inputs": asdict(self.inputs),
            "class_names": list(self.class_names),
            "data": self.data,
            "environment": self.environment,
        }

    @classmethod
    def from_json(cls, value: Any, origin: Path) -> RunConfig:
        """Raises UserError where ``value`` is not what :meth:`to_json` makes."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{origin} was not written by locallearn.")
        _check_version(value, origin)
        try:
            inputs = value["inputs"]
            config = cls(
                settings=TrainConfig.from_json(value["settings"]),
                inputs=InputSpec(
                    image_size=(inputs["image_size"][0], inputs["image_size"][1]),
                    num_channels=inputs["num_channels"],
                    resize=inputs["resize"],
                    mean=tuple(inputs["mean"]),
                    std=tuple(inputs["std"]),
                ),
                class_names=tuple(value["class_names"]),
                data=value["data"],
                environment=value["environment"],
            )
            for key in ("fingerprint", "in_memory"):
                config.data[key]
            for key in ("packages", "device_name"):
                config.environment[key]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{origin} is incomplete or was edited ({error!r}).") from error
        return config


@dataclass(frozen=True)
class Metrics:
    """What metrics.csv holds.

    Arguments:
        columns: heading -> a value an epoch, None where it is missing or not finite; no columns
            where there is no file yet.
    """

    columns: dict[str, Column]

    @property
    def num_epochs(self) -> int:
        return len(self.columns.get("epoch", ()))

    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks with an accuracy of their own, in the network's order."""
        names = [name.removesuffix("_acc") for name in self.columns if name.endswith("_acc")]
        return tuple(name for name in names if name not in NETWORK_COLUMNS)


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.checkpoint_path = path / "checkpoint.pt"
        self.metrics_path = path / "metrics.csv"
        self.tensorboard_path = path / "tensorboard"
        self.model_path = path / "model.safetensors"
        self.summary_path = path / "summary.json"
        self.exits_path = path / "exits.json"

    @property
    def is_finished(self) -> bool:
        """Whether there are results; a summary that can't be read is none, and is made anew."""
        return self.read_summary() is not None

    def check_free(self) -> None:
        """Raises UserError where a new run can't be put here."""
        if self.config_path.exists():
            raise UserError(
                f"{self.path} already holds a run. Choose another --out, or continue it with "
                f"`locallearn train --resume {self.path}`."
            )
        others = [self.checkpoint_path, self.metrics_path, self.tensorboard_path]
        for path in (*others, self.model_path, self.summary_path):
            if path.exists():
                raise UserError(f"{path} is left from a run; choose another --out, or remove it.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; give a directory.")

    def create(self, config: RunConfig) -> None:
        """Make the directory and write config.json. Raises OSError as the file system says."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_path, config.to_json())

    def read_config(self) -> RunConfig:
        """Raises UserError where this is no run directory."""
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no directory; expected a run directory.")
        if not self.config_path.is_file():
            raise UserError(f"{self.path} is no run directory: it holds no config.json.")
        try:
            value = json.loads(self.config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.config_path} is no valid JSON ({error}).") from error
        return RunConfig.from_json(value, self.config_path)

    def read_summary(self) -> dict[str, Any] | None:
        """The results of a finished run, or None where there are none that can be read."""
        try:
            summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(summary, dict) and isinstance(summary.get("test_acc"), float)
        return summary if whole else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json; the last file of a run."""
        write_json(self.summary_path, summary)

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """metrics.csv with exactly these rows."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics_path, text.getvalue().encode())

    def read_metrics(self) -> Metrics:
        """metrics.csv, without a last line that was cut.

        Raises:
            UserError: names the line, or the column, that is not as :meth:`write_metrics` makes it.
        """
        path = self.metrics_path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Metrics({})
        except ValueError as error:
            raise UserError(f"{path} can't be read: it is no text ({error}).") from error
        remedy = "Restore the file, or resume the run, which writes it anew."
        lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
        if not lines:
            return Metrics({})
        headings = lines[0]
        if missing := [name for name in _NEEDED if name not in headings]:
            raise UserError(f"{path} can't be read: it has no column {missing[0]}. {remedy}")
        rows = []
        for number, cells in enumerate(lines[1:], start=2):
            try:
                if len(cells) != len(headings):
                    raise ValueError(f"{len(cells)} values for {len(headings)} columns")
                rows.append([_finite(cell) for cell in cells])
            except ValueError as error:
                raise UserError(
                    f"{path} can't be read: line {number} is wrong ({error}). {remedy}"
                ) from error
        return Metrics({name: tuple(row[i] for row in rows) for i, name in enumerate(headings)})


def _finite(cell: str) -> float | None:
    if not cell:
        return None
    value = float(cell)
    return value if math.isfinite(value) else None


def _check_version(value: dict[str, Any], origin: Path) -> None:
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{origin} has format version {version}; this locallearn reads version "
            f"{FORMAT_VERSION}. Use the version that made it."
        )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Raises OSError as the file system says.

    Serialised to memory first: torch.save into a file turns a full disk into a RuntimeError.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values alone; nothing is ever unpickled.

    Raises:
        UserError: truncated, foreign, or of another version.
        OSError: as the file system says.
    """
    # Read first, so that an OSError below is torch's word for a broken archive.
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds on foreign bytes
        whole = _ZIP_END in content.getvalue()[-_ZIP_END_REACH:]
        why = "it was not written by locallearn" if whole else "it is truncated or no checkpoint"
        raise UserError(f"{path} can't be read: {why}.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} can't be read: it was not written by locallearn.")
    _check_version(state, path)
    return state
