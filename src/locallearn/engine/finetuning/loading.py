"""Puts weights into a learner: all whose name and shape fit, and a new output layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.data import InputSpec
from locallearn.engine.building import build_network
from locallearn.engine.config import TrainConfig
from locallearn.engine.finetuning.source import Start
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.models import is_foreign

_COUNTER = ".num_batches_tracked"  # which weights saved by old versions of torch lack
# Auxiliary classifiers, without which the packages' models are built here.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_MOST_NAMED = 3


@dataclass(frozen=True)
class Loaded:
    """What came from where.

    Arguments:
        num_loaded: numbers of the model that were loaded.
        new: names of the model's tensors that were drawn anew.
        left_out: names of tensors that the model has no place for, and may be without.
        heads: names of the blocks whose heads were loaded.
        new_heads: of those whose heads are new, and learn something.
    """

    num_loaded: int
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    heads: tuple[str, ...]
    new_heads: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


@torch.no_grad()
def load_start(
    learner: LocalLearner,
    start: Start,
    settings: TrainConfig,
    inputs: InputSpec,
    class_names: Sequence[str],
) -> Loaded:
    """Put a start's weights into a fresh learner.

    What depends on the number of classes is loaded where the source tells the same classes apart,
    or is not known to tell others, and its shape fits; else it stays as drawn. Everything else
    must be there, and fit.

    Arguments:
        learner: as built; changed in place.
        start: with its tensors.
        settings: the run's, resolved.
        inputs: what the network will see.
        class_names: of the data.

    Raises:
        UserError: names the first tensor that does not fit, or is missing, or has no place.
    """
    state = learner.model.state_dict()
    if not start.tensors:
        return Loaded(0, tuple(state), (), (), _learning_heads(learner, set()))
    of_classes = class_dependent(settings, inputs, len(class_names))
    is_same_task = start.class_names is None or start.class_names == tuple(class_names)
    new = []
    num_loaded = 0
    for name, tensor in state.items():
        given = start.tensors.get(name)
        fits = given is not None and given.shape == tensor.shape
        if name in of_classes and not (fits and is_same_task):
            new.append(name)
        elif given is None and name.endswith(_COUNTER):
            continue
        elif given is None:
            raise UserError(
                f"{start.text} has no tensor {name!r}, which model {settings.model} needs. Give "
                f"weights of that model."
            )
        elif not fits:
            raise UserError(
                f"tensor {name!r} of {start.text} has shape {_shape(given)}; model "
                f"{settings.model}, built for {len(class_names)} classes and images of "
                f"{inputs.num_channels}x{inputs.image_size[0]}x{inputs.image_size[1]}, has "
                f"{_shape(tensor)} there. Give weights of that model, or another --image-size."
            )
        else:
            tensor.copy_(given)
            num_loaded += tensor.numel()
    extra = sorted(set(start.tensors) - set(state))
    foreign = [name for name in extra if not name.startswith(_AUXILIARY)]
    if foreign:
        raise UserError(
            f"{start.text} holds {_some(foreign)}, for which model {settings.model} has no place. "
            f"Give weights of that model."
        )
    heads = _load_heads(learner, start) if start.class_names == tuple(class_names) else set()
    return Loaded(
        num_loaded, tuple(new), tuple(extra), tuple(sorted(heads)), _learning_heads(learner, heads)
    )


def class_dependent(settings: TrainConfig, inputs: InputSpec, num_classes: int) -> set[str]:
    """Names of a model's tensors whose shapes depend on the number of classes: the output layer."""
    shapes = []
    # Without memory, where building is known not to look at values: files of users may.
    has_values = is_foreign(settings.model) and not settings.model.startswith("torchvision:")
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if has_values else "meta"):
        for num in (num_classes, num_classes + 1):
            network = build_network(settings, inputs, num)
            shapes.append({name: t.shape for name, t in network.state_dict().items()})
    ours, theirs = shapes
    return {name for name, shape in ours.items() if theirs.get(name) != shape}


def _load_heads(learner: LocalLearner, start: Start) -> set[str]:
    """Load those heads whose tensors all fit; names of their blocks."""
    loaded = set()
    for name, head in _heads(learner):
        given, ours = start.heads.get(name), head.state_dict()
        if given is None or set(given) != set(ours):
            continue
        if all(given[key].shape == tensor.shape for key, tensor in ours.items()):
            head.load_state_dict(dict(given))
            loaded.add(name)
    return loaded


def _heads(learner: LocalLearner) -> list[tuple[str, nn.Module]]:
    return list(zip(learner.block_names, learner.heads, strict=False))


def _learning_heads(learner: LocalLearner, loaded: set[str]) -> tuple[str, ...]:
    """Names of the blocks whose heads have something to learn, and were not loaded."""
    return tuple(
        name
        for name, head in _heads(learner)
        if name not in loaded and any(p.requires_grad for p in head.parameters())
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown
