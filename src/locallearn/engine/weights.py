"""Trained weights: written to and read from model.safetensors, or read from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from locallearn.engine.building import build_learner, needs_recalibration
from locallearn.engine.exits import ExitRecord
from locallearn.engine.files import write_atomically
from locallearn.engine.learner import LocalLearner
from locallearn.engine.run import RunConfig, RunDirectory, load_checkpoint
from locallearn.errors import UserError

_METADATA_KEY = "locallearn"


@dataclass(frozen=True)
class Trained:
    """A learner with trained weights, in evaluation mode.

    Arguments:
        learner: on the CPU.
        config: of the run that trained it.
        origin: the file the weights are from.
        num_epochs: finished epochs; None where the file does not say.
        needs_recalibration: whether BatchNorm's running statistics still belong to other weights,
            as they do in a checkpoint from the middle of an epoch.
    """

    learner: LocalLearner
    config: RunConfig
    origin: Path
    num_epochs: int | None
    needs_recalibration: bool

    def check_statistics(self, run: str) -> None:
        """Raises UserError where there is no data to recalibrate with and it would be needed.

        Arguments:
            run: as the user calls it.
        """
        if self.needs_recalibration:
            raise UserError(
                f"{run} was stopped in the middle of an epoch and its BatchNorm statistics are not "
                f"those of its weights. Finish it with `locallearn train --resume {run}`."
            )


def save_weights(path: Path, learner: LocalLearner, config: RunConfig) -> None:
    """The model's and the heads' tensors, and the config as metadata, atomically."""
    tensors = {f"model.{name}": t for name, t in learner.model.state_dict().items()}
    tensors |= {f"heads.{name}": t for name, t in learner.heads.state_dict().items()}
    # Copies, for weights that are tied share memory, which the format does not know.
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    metadata = {_METADATA_KEY: json.dumps(config.to_json())}
    write_atomically(path, save(copies, metadata=metadata))


def weights_digest(learner: LocalLearner) -> str:
    """sha256 of the model's tensors as they are now, in its own order."""
    digest = hashlib.sha256()
    for name, tensor in learner.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_exits(trained: Trained, run: Path) -> ExitRecord | None:
    """The exits' temperatures and threshold of a run directory, given to its learner; None where
    there are none, or they are of other weights.

    Raises:
        UserError: an exits.json that can't be read.
    """
    if not run.is_dir():
        return None
    record = ExitRecord.read(RunDirectory(run).exits_path)
    if record is None or record.weights != weights_digest(trained.learner):
        return None
    trained.learner.exit_temperatures = dict(record.temperatures)
    return record


def load_trained(path: Path) -> Trained:
    """From a run directory (its final weights, else its checkpoint), or from one such file.

    The model is built anew for them: where a Python file builds it, that file is run.

    Raises:
        UserError: nothing there, or nothing that locallearn wrote.
    """
    if path.is_dir():
        run = RunDirectory(path)
        run.read_config()
        if run.model_path.exists() and run.is_finished:
            return _from_safetensors(run.model_path)
        if run.checkpoint_path.exists():
            return _from_checkpoint(run.checkpoint_path)
        raise UserError(
            f"{path} has no weights yet: the run was stopped before its first checkpoint. "
            f"Continue it with `locallearn train --resume {path}`."
        )
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or a file of one.")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    return _from_checkpoint(path)


def _from_checkpoint(path: Path) -> Trained:
    state = load_checkpoint(path)
    config = RunConfig.from_json(state.get("config"), path)
    learner = build_learner(config.settings, config.inputs, len(config.class_names))
    try:
        learner.load_training_state(state["learner"])
        is_stale = state["step"] > 0 and needs_recalibration(config.settings)
        num_epochs = state["epoch"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit its own settings ({error}).") from error
    learner.eval()
    return Trained(learner, config, path, num_epochs, needs_recalibration=is_stale)


def _from_safetensors(path: Path) -> Trained:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be read: it is truncated or no safetensors file.") from error
    if _METADATA_KEY not in metadata:
        raise UserError(f"{path} can't be read: it was not written by locallearn.")
    config = RunConfig.from_json(json.loads(metadata[_METADATA_KEY]), path)
    learner = build_learner(config.settings, config.inputs, len(config.class_names))
    learner.eval()
    try:
        for prefix, module in (("model.", learner.model), ("heads.", learner.heads)):
            part = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(part)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own settings ({error}).") from error
    return Trained(learner, config, path, None, needs_recalibration=False)
