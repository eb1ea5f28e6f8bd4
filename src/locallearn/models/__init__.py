"""Blocks (the unit of locality) and the networks made of them. No loss and no label here."""

from locallearn.models.blocks import (
    ACTIVATIONS,
    DEFAULT_STYLE,
    NORMS,
    Block,
    BlockStyle,
    ConvBlock,
    DepthwiseSeparableBlock,
    Layer,
    LinearBlock,
)
from locallearn.models.mobilenet import mobilenet_v1
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import (
    ModelSpec,
    build_block_network,
    build_model,
    list_models,
    model_spec,
)
from locallearn.models.smallconv import smallconv, smallconv_l
from locallearn.models.sources import is_foreign
from locallearn.models.vgg import vgg8, vgg11

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_STYLE",
    "NORMS",
    "Block",
    "BlockNetwork",
    "BlockStyle",
    "ConvBlock",
    "DepthwiseSeparableBlock",
    "Layer",
    "LinearBlock",
    "ModelSpec",
    "build_block_network",
    "build_model",
    "is_foreign",
    "list_models",
    "mobilenet_v1",
    "model_spec",
    "smallconv",
    "smallconv_l",
    "vgg8",
    "vgg11",
]
