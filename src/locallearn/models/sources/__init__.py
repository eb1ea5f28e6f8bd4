"""Models from elsewhere by name: torchvision's, timm's, and those of the user's own files.

What is built is a plain `nn.Module` with fresh weights, without blocks of ours and without the
settings that only our own networks have (width, style, dropout).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Protocol

import torch
from torch import Tensor, nn

from locallearn.errors import UserError
from locallearn.models.sources import from_file, from_timm, from_torchvision
from locallearn.models.sources.blame import say_error
from locallearn.models.sources.from_file import file_digest
from locallearn.models.sources.names import (
    FORMS,
    PACKAGES,
    ForeignName,
    absolute_name,
    is_foreign,
    parse_name,
    short_name,
)

__all__ = [
    "FORMS",
    "PACKAGES",
    "absolute_name",
    "build_foreign",
    "check_foreign",
    "check_logits",
    "is_foreign",
    "list_foreign",
    "model_digest",
    "short_name",
]


class Builder(Protocol):
    def __call__(
        self,
        name: ForeignName,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int] | None,
    ) -> nn.Module: ...


@dataclass(frozen=True)
class Source:
    """Where models come from.

    Arguments:
        reserved: options that can't be given, and why.
        check: raises UserError where there is no such model.
        build: makes it.
        list_names: of all its models that there are to list.
    """

    reserved: dict[str, str]
    check: Callable[[ForeignName], None]
    build: Builder
    list_names: Callable[[], list[str]] = list


_PACKAGES = {
    "torchvision": Source(
        from_torchvision.RESERVED,
        from_torchvision.check,
        from_torchvision.build,
        from_torchvision.list_names,
    ),
    "timm": Source(from_timm.RESERVED, from_timm.check, from_timm.build, from_timm.list_names),
}
_FILE = Source(from_file.RESERVED, from_file.check, from_file.build)


def _source(name: ForeignName) -> Source:
    return _FILE if name.path is not None else _PACKAGES[name.source]


def check_foreign(text: str) -> None:
    """Look for a model without building it: a file is not run.

    Raises:
        UserError: no such model, package, file or form of a name, or a reserved option.
    """
    name = parse_name(text)
    source = _source(name)
    for option, why in source.reserved.items():
        if option in name.options:
            raise UserError(f"model {text!r}: the option {option!r} can't be given: {why}.")
    source.check(name)


def build_foreign(
    text: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """A model from elsewhere, freshly initialised from torch's global generator.

    Arguments:
        text: its name.
        num_classes: K.
        in_channels: channels of the images.
        image_size: height and width, pixels, for models that are built for one size; None leaves
            them at their own.

    Raises:
        UserError: as :func:`check_foreign`, or whatever its builder says against it.
    """
    check_foreign(text)
    name = parse_name(text)
    try:
        return _source(name).build(
            name, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    except UserError:
        raise
    except Exception as error:  # a builder's own, about its options or the image size
        raise UserError(f"model {text!r} can't be built: {say_error(error, name)}.") from error


def check_logits(text: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raises UserError where a model does not make logits (N, K) of images (N, C, H, W)."""
    size = "x".join(map(str, images.shape[1:]))
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # whatever its forward says against them
        say = say_error(error, parse_name(text))
        raise UserError(f"model {text!r} does not take images of {size}: {say}.") from error
    finally:
        model.train(was_training)
    expected = (len(images), num_classes)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        what = type(logits).__name__
        if isinstance(logits, Tensor):
            what = f"a tensor of shape {tuple(logits.shape)}"
        raise UserError(
            f"model {text!r} makes {what} of {len(images)} images; logits of shape {expected} are "
            f"expected, a number for each class."
        )


def list_foreign(pattern: str) -> list[str]:
    """Full names of a package's models that match a glob such as ``timm:res*``, sorted.

    Raises:
        UserError: another source than those of :data:`PACKAGES`, or one that is not installed.
    """
    package, _, rest = pattern.partition(":")
    if package not in _PACKAGES:
        raise UserError(
            f"models of {package!r} can't be listed; those of {' and '.join(_PACKAGES)} can, as in "
            f"'torchvision:res*'."
        )
    names = _PACKAGES[package].list_names()
    return [f"{package}:{name}" for name in names if fnmatch(name, rest or "*")]


def model_digest(text: str) -> str | None:
    """sha256 of the file that builds a model; None where it has none, or the file is not there.

    Of that file alone: what it imports is not looked at.
    """
    path = parse_name(text).path if is_foreign(text) else None
    return None if path is None else file_digest(path)
