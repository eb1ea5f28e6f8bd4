"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from locallearn.errors import UserError
from locallearn.models.blocks import DEFAULT_STYLE, BlockStyle
from locallearn.models.network import BlockNetwork
from locallearn.models.sources import FORMS, build_foreign, is_foreign, list_foreign
from locallearn.registry import Registry


class ModelBuilder(Protocol):
    def __call__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        dropout: float,
        width: float,
        style: BlockStyle,
    ) -> BlockNetwork: ...


@dataclass(frozen=True)
class ModelSpec:
    """A registered model.

    Arguments:
        name: in the registry.
        summary: one line.
        min_image_size: smallest height and width at which every block's activation still has a
            position for each of its pooling cells, pixels.
        build: makes it.
    """

    name: str
    summary: str
    min_image_size: int
    build: ModelBuilder


_MODELS: Registry[ModelSpec] = Registry("model")


def register_model(
    name: str, *, summary: str, min_image_size: int
) -> Callable[[ModelBuilder], ModelBuilder]:
    """Decorator: make a builder known by name."""

    def add(build: ModelBuilder) -> ModelBuilder:
        _MODELS.add(name, ModelSpec(name, summary, min_image_size, build))
        return build

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a glob, sorted: of the package's own networks, or of those of
    torchvision or timm where it begins with that and a colon (``torchvision:res*``).

    Raises:
        UserError: models of a source that can't be listed.
    """
    return list_foreign(pattern) if ":" in pattern else _MODELS.names(pattern)


def model_spec(name: str) -> ModelSpec:
    """What is registered under a name. Raises UserError with the valid names."""
    try:
        return _MODELS.get(name)
    except UserError as error:
        raise UserError(f"{error} From elsewhere: {FORMS}.") from None


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    dropout: float = 0.0,
    width: float = 1.0,
    style: BlockStyle = DEFAULT_STYLE,
) -> nn.Module:
    """A network by name, freshly initialised from torch's global generator.

    The package's own are :class:`BlockNetwork`s; those from elsewhere are what their builders
    return. Nothing is downloaded. To build a model of a Python file, the file is run.

    Arguments:
        name: one of :func:`list_models`; or from elsewhere ``torchvision:NAME``, ``timm:NAME``
            (needs the extra `timm`) or ``FILE.py:FUNCTION``, each with any options of its builder
            as ``NAME:OPTION=VALUE:OPTION=VALUE`` (``torchvision:resnet18:stem=cifar``).
        num_classes: K.
        in_channels: channels of the images.
        image_size: height and width (or both) of the images, pixels. The package's networks take
            any size from their smallest up and are built the same for all; giving it has it
            checked. Of those from elsewhere, some are built for one size: see
            `models.sources.from_timm` and its neighbours.
        dropout: probability, between blocks.
        width: every block has so many times the channels (MobileNet's alpha).
        style: normalisation and activation of the blocks.

    Raises:
        UserError: unknown name (lists the valid ones, or the nearest), a number out of range,
            images too small for the architecture, dropout, width or style for a model from
            elsewhere, or what its builder says.
    """
    if not is_foreign(name):
        return build_block_network(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            dropout=dropout,
            width=width,
            style=style,
        )
    _check_counts(num_classes, in_channels)
    for argument, is_given in (
        ("dropout", dropout != 0.0),
        ("width", width != 1.0),
        ("style", style != DEFAULT_STYLE),
    ):
        if is_given:
            raise UserError(
                f"{argument} is of the package's own networks; model {name!r} takes the options "
                f"of its own builder, as NAME:OPTION=VALUE."
            )
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    return build_foreign(name, num_classes=num_classes, in_channels=in_channels, image_size=sides)


def build_block_network(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    dropout: float = 0.0,
    width: float = 1.0,
    style: BlockStyle = DEFAULT_STYLE,
) -> BlockNetwork:
    """One of the package's own networks, as :func:`build_model`."""
    spec = model_spec(name)
    _check_counts(num_classes, in_channels)
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout must be in [0, 1), got {dropout}.")
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        side = min(sides)
        if side < spec.min_image_size:
            fitting = [n for n in list_models() if _MODELS.get(n).min_image_size <= side]
            advice = f"Models for this size: {', '.join(fitting)}." if fitting else ""
            raise UserError(
                f"images of {sides[0]}x{sides[1]} pixels are too small for {name}, which needs at "
                f"least {spec.min_image_size}x{spec.min_image_size}. {advice}".rstrip()
            )
    return spec.build(
        in_channels=in_channels,
        num_classes=num_classes,
        dropout=dropout,
        width=width,
        style=style,
    )


def _check_counts(num_classes: int, in_channels: int) -> None:
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise UserError(f"{argument} must be at least 1, got {value}.")
