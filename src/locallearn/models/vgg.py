"""VGG8 and VGG11 with BatchNorm.

Source: LLS (arXiv 2405.15868), tables 1 and 3; sizes from the authors' code.
"""

from __future__ import annotations

from typing import Any

from locallearn.models.blocks import DEFAULT_STYLE, BlockStyle, ConvBlock, LinearBlock, scaled
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import register_model

# Random bases are drawn at this length and pooled to each block's own (the authors' hidden_dim).
_BASIS_LENGTH = 2048
_POOL_SIZE = 2


@register_model(
    "vgg8", summary="6 conv blocks (128 to 512) and a linear one (1024)", min_image_size=16
)
def vgg8(**settings: Any) -> BlockNetwork:
    """C128 [4], C256 [2], M, C256 [2], C256 [2], M, C512 [2], M, C512 [2], Linear 1024 [1024]."""
    plan = [(128, 4, 1), (256, 2, 2), (256, 2, 1), (256, 2, 2), (512, 2, 2), (512, 2, 1)]
    return _vgg(plan, [(1024, 1024)], **settings)


@register_model(
    "vgg11", summary="8 conv blocks (64 to 512) and two linear ones (4096)", min_image_size=32
)
def vgg11(**settings: Any) -> BlockNetwork:
    """The eight convolutions of VGG11, Linear 4096 [2048] twice.

    The last activation is pooled to 2x2, as in the other networks here, and not spread to 8x8 as
    in the authors' code: at 32x32 pixels it *is* 2x2, so that 126 of the 134 million weights of
    their first linear block see copies.
    """
    plan = [
        (64, 4, 2),
        (128, 2, 2),
        (256, 2, 1),
        (256, 2, 2),
        (512, 2, 1),
        (512, 2, 2),
        (512, 2, 1),
        (512, 2, 1),
    ]
    return _vgg(plan, [(4096, 2048), (4096, 2048)], **settings)


def _vgg(
    plan: list[tuple[int, int, int]],
    linear_plan: list[tuple[int, int]],
    *,
    in_channels: int,
    num_classes: int,
    dropout: float = 0.0,
    width: float = 1.0,
    style: BlockStyle = DEFAULT_STYLE,
) -> BlockNetwork:
    """``plan``: (out_channels, latent_size, max_pool) of each convolutional block.

    ``linear_plan``: (out_features, latent_size) of each linear one.
    """
    linear_blocks = []
    in_features = scaled(width, plan[-1][0]) * _POOL_SIZE**2
    for out_features, latent_size in linear_plan:
        linear_blocks.append(
            LinearBlock(
                in_features,
                scaled(width, out_features),
                latent_size=scaled(width, latent_size),
                basis_length=_BASIS_LENGTH,
                style=style,
            )
        )
        in_features = linear_blocks[-1].out_channels
    conv_blocks = []
    for out_channels, latent_size, max_pool in plan:
        conv_blocks.append(
            ConvBlock(
                in_channels,
                scaled(width, out_channels),
                latent_size=latent_size,
                max_pool=max_pool,
                basis_length=_BASIS_LENGTH,
                style=style,
            )
        )
        in_channels = conv_blocks[-1].out_channels
    return BlockNetwork(
        conv_blocks,
        pool_size=_POOL_SIZE,
        linear_blocks=linear_blocks,
        num_classes=num_classes,
        dropout=dropout,
    )
