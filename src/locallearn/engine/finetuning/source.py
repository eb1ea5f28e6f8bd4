"""Where a fine-tuning starts: a run of ours, or a package's model with or without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from locallearn.data import InputSpec
from locallearn.engine.building import changed_file
from locallearn.engine.config import rule_option_names
from locallearn.engine.run import RunDirectory
from locallearn.engine.weights import load_trained
from locallearn.errors import UserError
from locallearn.models.sources import PACKAGES, check_foreign
from locallearn.models.sources.published import load_published, usual_view

# Of a run, what its weights make sense with.
_OF_THE_MODEL = ("model", "blocks", "activation", "norm", "width", "dropout")
_OF_THE_RULE = ("rule", *rule_option_names(), "group_blocks", "head_after_pool")
_PACKAGE_RULE = "lls-mxm"
_FORMS = (
    "a run directory, its checkpoint.pt or model.safetensors, or torchvision:NAME[@WEIGHTS] or "
    "timm:NAME[@WEIGHTS]"
)
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# State dicts that training scripts wrap, and the prefix of DistributedDataParallel.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema")
_PARALLEL = "module."


@dataclass(frozen=True)
class Start:
    """What a fine-tuning starts from.

    Arguments:
        text: as --from, paths absolute.
        settings: of the model and the rule, to train it further; names of `TrainConfig`.
        inputs: what the network was trained to see.
        tensors: of the model, by name; empty where weights are fresh.
        heads: block name -> tensors of its head.
        class_names: that it tells apart; None where that is not known.
        digest: sha256 of the file, or of the tensors; None where weights are fresh.
        notes: what the user should know, a line each.
    """

    text: str
    settings: dict[str, Any]
    inputs: InputSpec
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()


def read_source(text: str, image_size: int | None = None) -> Start:
    """What --from names, with its weights on the CPU.

    Arguments:
        text: a run directory, ``checkpoint.pt`` or ``model.safetensors`` of one; or
            ``torchvision:NAME[:OPTION=VALUE][@WEIGHTS]``, ``timm:NAME[@WEIGHTS]``, where WEIGHTS
            is the name of published ones or the path of a state dict (.pth, .pt, .safetensors).
        image_size: height and width to see images at, pixels; the source's own where None.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if not text.strip():
        raise UserError(f"--from is empty; expected {_FORMS}.")
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size must be at least 1, got {image_size}.")
    is_package = text.split(":")[0] in PACKAGES and ":" in text
    start = _from_package(text) if is_package else _from_run(text)
    if image_size is None or start.inputs.image_size == (image_size, image_size):
        return start
    inputs = start.inputs
    inputs = InputSpec((image_size,) * 2, inputs.num_channels, None, inputs.mean, inputs.std)
    return Start(**{**vars(start), "inputs": inputs})


def _from_run(text: str) -> Start:
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise UserError(f"--from {text}: there is no such file or directory. Expected {_FORMS}.")
    if path.is_dir() and not RunDirectory(path).config_path.exists():
        raise UserError(f"--from {text} holds no run: it has no config.json. Expected {_FORMS}.")
    trained = load_trained(path)
    trained.check_statistics(text)
    config, learner = trained.config, trained.learner
    notes = []
    if change := changed_file(config.settings):
        notes.append(f"{change}: its weights fit the model as it is now")
    if trained.num_epochs is not None and trained.num_epochs < (config.settings.epochs or 0):
        notes.append(
            f"{text} is not finished: weights after {trained.num_epochs} of "
            f"{config.settings.epochs} epochs"
        )
    return Start(
        text=str(path),
        settings={name: getattr(config.settings, name) for name in (*_OF_THE_MODEL, *_OF_THE_RULE)},
        inputs=config.inputs,
        tensors=learner.model.state_dict(),
        heads={
            name: head.state_dict()
            for name, head in zip(learner.block_names, learner.heads, strict=False)
        },
        class_names=config.class_names,
        digest=_file_digest(trained.origin),
        notes=tuple(notes),
    )


def _from_package(text: str) -> Start:
    model, _, weights = text.partition("@")
    check_foreign(model)
    settings = {"model": model, "rule": _PACKAGE_RULE}
    if "@" in text and not weights:
        raise UserError(
            f"--from {text} names no weights behind the @; leave it out for fresh ones."
        )
    is_file = "/" in weights or Path(weights).suffix in _SUFFIXES
    view = usual_view(model, weights if weights and not is_file else None)
    inputs = InputSpec((view.side, view.side), 3, None, view.mean, view.std)
    if not weights:
        name = "DEFAULT" if model.startswith("torchvision") else "pretrained"
        note = (
            f"{model} starts with freshly drawn weights, trained on nothing. Trained ones are "
            f"named behind an @: {model}@{name} or {model}@FILE.pth"
        )
        return Start(text=model, settings=settings, inputs=inputs, notes=(note,))
    if is_file:
        path = Path(weights).expanduser().absolute()
        tensors = _read_state(path)
        return Start(
            text=f"{model}@{path}",
            settings=settings,
            inputs=inputs,
            tensors=tensors,
            digest=_file_digest(path),
        )
    tensors = load_published(model, weights)
    return Start(
        text=text, settings=settings, inputs=inputs, tensors=tensors, digest=_digest(tensors)
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a file; nothing is ever unpickled but tensors and plain values.

    Raises:
        UserError: no such file, or no state dict in it.
    """
    if not path.is_file():
        files = ", ".join(_SUFFIXES)
        raise UserError(f"there is no file {path} with weights; expected a state dict ({files}).")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_safetensors(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path} can't be read: it is truncated or no safetensors file.") from error
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds on foreign bytes
        raise UserError(
            f"{path} can't be read: it is truncated, or holds more than tensors. Save the model's "
            f"state_dict() alone."
        ) from error
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    is_state = isinstance(state, dict) and bool(state)
    if not is_state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict; save the model's state_dict().")
    if all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    return dict(state)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(total, name, tensors[name])
    return total.hexdigest()


def add_tensor(total: Any, name: str, tensor: Tensor) -> None:
    """Go on with a digest by a tensor: its name, type, shape and values."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    total.update(flat.numpy().data)
