"""Weights that torchvision and timm publish, downloaded by the packages themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locallearn.errors import UserError, unknown_name
from locallearn.models.sources.from_timm import load_timm
from locallearn.models.sources.names import ForeignName, parse_name

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224
_TIMM_DEFAULT = "pretrained"


@dataclass(frozen=True)
class UsualView:
    """What a package's model is trained to see: RGB images of so many pixels a side, normalised
    by mean and standard deviation of each channel."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def usual_view(text: str, weights: str | None) -> UsualView:
    """What a package's model sees.

    Arguments:
        text: name of the model.
        weights: name of published weights; None for others, or none.

    Raises:
        UserError: no such weights.
    """
    name = parse_name(text)
    mean, std = _IMAGENET
    if name.source == "timm":
        configuration = load_timm().get_pretrained_cfg(_tagged(name, weights))
        if configuration is None:
            return UsualView(_IMAGENET_SIZE, mean, std)
        mean, std = tuple(configuration.mean), tuple(configuration.std)
        return UsualView(configuration.input_size[1], mean, std)
    if weights is None:
        return UsualView(_IMAGENET_SIZE, mean, std)
    preset = _torchvision_weights(name, weights).transforms.keywords
    side = preset["crop_size"]
    return UsualView(side, tuple(preset.get("mean", mean)), tuple(preset.get("std", std)))


def load_published(text: str, weights: str) -> dict[str, Tensor]:
    """The state dict of a package's model, as published; downloaded where it is not here yet.

    Arguments:
        text: name of the model.
        weights: of torchvision, a name such as DEFAULT or IMAGENET1K_V1; of timm, "pretrained" or
            a tag.

    Raises:
        UserError: no such weights, or they can't be downloaded.
    """
    name = parse_name(text)
    if name.source == "timm":
        timm, tagged = load_timm(), _tagged(name, weights)
        return _downloaded(name, weights, lambda: _timm_state(timm, tagged))
    found = _torchvision_weights(name, weights)
    return _downloaded(name, weights, lambda: found.get_state_dict(progress=False, check_hash=True))


def _timm_state(timm: Any, tagged: str) -> Any:
    return timm.create_model(tagged, pretrained=True).state_dict()


def _downloaded(name: ForeignName, weights: str, load: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load()
    except Exception as error:  # urllib's, huggingface_hub's, ssl's and a dozen more
        what = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"the weights {weights!r} of {name.source}:{name.name} can't be loaded "
            f"({type(error).__name__}: {what}). Without a network, get the file elsewhere and give "
            f"its path: {name.text}@FILE.pth."
        ) from error
    return state


def _torchvision_weights(name: ForeignName, weights: str) -> Any:
    from torchvision import models

    valid = models.get_model_weights(name.name)
    if weights not in valid.__members__:
        names = [*valid.__members__]
        raise unknown_name(f"weights of {name.source}:{name.name} (or file):", weights, names)
    return valid[weights]


def _tagged(name: ForeignName, weights: str | None) -> str:
    """timm's name of a model with its weights: NAME.TAG."""
    if weights is None or weights == _TIMM_DEFAULT:
        return name.name
    base = name.name.partition(".")[0]
    valid = load_timm().list_pretrained(f"{base}.*")
    if f"{base}.{weights}" not in valid:
        tags = [_TIMM_DEFAULT, *(each.partition(".")[2] for each in valid)]
        raise unknown_name(f"weights of timm:{base} (or file):", weights, tags)
    return f"{base}.{weights}"
