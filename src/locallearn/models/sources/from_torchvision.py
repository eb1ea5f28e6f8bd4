"""Networks that classify images, from torchvision, with fresh weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from locallearn.errors import UserError, unknown_name
from locallearn.models.sources.names import ForeignName

_STEMS = ("cifar",)

# They are built with auxiliary classifiers unless told otherwise, and ask for the initialisation to
# be said: True is what they do, with a warning, where it is not.
_WITH_AUXILIARY = ("googlenet", "inception_v3")
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}

RESERVED = {
    "num_classes": "it is the number of classes of the data",
    "weights": "nothing is downloaded, and weights are fresh",
    "aux_logits": "auxiliary classifiers are left out: a model must return its logits alone",
}


def list_names() -> list[str]:
    """Of the models that classify images, sorted."""
    from torchvision import models

    return sorted(models.list_models(module=models))


def check(name: ForeignName) -> None:
    """Raises UserError where there is no such model, or it does not classify images."""
    from torchvision import models

    if name.name in list_names():
        return
    if name.name in models.list_models():
        raise UserError(
            f"{name.source}:{name.name} does not classify images, and only such models can be "
            f"trained. `locallearn list models 'torchvision:*'` lists them."
        )
    raise unknown_name(
        "torchvision model",
        name.name,
        list_names(),
        listed_by="locallearn list models 'torchvision:*'",
    )


def build(
    name: ForeignName,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """``torchvision.models.get_model`` without weights, fitted to the data.

    A Vision Transformer is built for ``image_size`` (square), a MaxViT too, unless an option says
    otherwise; the others take any. Where ``in_channels`` is not 3, the first convolution is
    replaced by one of the same geometry with so many inputs, initialised as PyTorch does.

    The option ``stem=cifar`` is ours: the ResNet family's first convolution becomes 3x3 with
    stride 1 and the max-pool behind it goes, as in ResNets for images of 32x32.
    """
    from torchvision import models

    options: dict[str, Any] = dict(name.options)
    stem = options.pop("stem", None)
    if stem is not None and stem not in _STEMS:
        raise unknown_name("stem", str(stem), _STEMS)
    if name.name in _WITH_AUXILIARY:
        options = _WITHOUT_AUXILIARY | options
    if image_size is not None and name.name.startswith("vit_") and len(set(image_size)) == 1:
        options.setdefault("image_size", image_size[0])
    if image_size is not None and name.name.startswith("maxvit_"):
        options.setdefault("input_size", image_size)
    model: nn.Module = models.get_model(name.name, weights=None, num_classes=num_classes, **options)
    if stem == "cifar":
        _use_cifar_stem(name, model)
    if in_channels != 3:
        _take_channels(model, in_channels)
    return model


def _use_cifar_stem(name: ForeignName, model: nn.Module) -> None:
    from torchvision.models import ResNet

    if not isinstance(model, ResNet):
        raise UserError(
            f"stem=cifar is for torchvision's ResNet family; {name.source}:{name.name} is a "
            f"{type(model).__name__}. Leave the option out."
        )
    conv = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as its others
    model.conv1 = conv
    model.maxpool = nn.Identity()


def _take_channels(model: nn.Module, in_channels: int) -> None:
    path, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    geometry: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")
    }
    has_bias = conv.bias is not None
    replacement = nn.Conv2d(in_channels, conv.out_channels, bias=has_bias, **geometry)
    model.set_submodule(path, replacement)
