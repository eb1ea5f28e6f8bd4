"""Networks from timm (the extra `timm`), with fresh weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from locallearn.errors import UserError, unknown_name
from locallearn.models.sources.names import ForeignName

RESERVED = {
    "num_classes": "it is the number of classes of the data",
    "in_chans": "it is the number of channels of the data",
    "pretrained": "nothing is downloaded, and weights are fresh",
}


def load_timm() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError("models of timm need it: pip install 'locallearn[timm]'.") from error
    return timm


def list_names() -> list[str]:
    """Of all its models, sorted. Raises UserError where it is not installed."""
    return sorted(load_timm().list_models())


def check(name: ForeignName) -> None:
    """Raises UserError where timm is not installed, or has no such model.

    A tag behind the name (``resnet18.a1_in1k``) chooses among pretrained weights, and changes
    little here.
    """
    if not load_timm().is_model(name.name):
        raise unknown_name(
            "timm model", name.name, list_names(), listed_by="locallearn list models 'timm:*'"
        )


def build(
    name: ForeignName,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """``timm.create_model`` without weights.

    Models that are built for one image size (ViT, Swin, Mixer and others: those whose configuration
    says ``fixed_input_size``) are built for ``image_size``, unless the option ``img_size`` says
    otherwise. Patches and windows keep their size: of 32x32 pixels, ``vit_tiny_patch16_224`` makes
    4 patches, and with ``patch_size=4`` 64.
    """
    timm = load_timm()
    options = dict(name.options)
    configuration = timm.get_pretrained_cfg(name.name)
    if image_size is not None and configuration is not None and configuration.fixed_input_size:
        options.setdefault("img_size", image_size)
    model: nn.Module = timm.create_model(
        name.name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model
