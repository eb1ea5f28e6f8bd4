"""MobileNet-V1.

Source: Howard et al., "MobileNets", arXiv 1704.04861, table 1; local pooling sizes from the LLS
authors' code (arXiv 2405.15868, table 3).
"""

from __future__ import annotations

from locallearn.models.blocks import (
    DEFAULT_STYLE,
    Block,
    BlockStyle,
    ConvBlock,
    DepthwiseSeparableBlock,
    scaled,
)
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import register_model

_BASIS_LENGTH = 2048

# (out_channels, stride, latent_size) of the depthwise-separable blocks.
_PLAN = [
    (64, 1, 4),
    (128, 2, 4),
    (128, 1, 4),
    (256, 2, 2),
    (256, 1, 2),
    (512, 2, 2),
    *[(512, 1, 2)] * 5,
    (1024, 2, 1),
    (1024, 1, 1),
]


@register_model(
    "mobilenet-v1",
    summary="a conv block and 13 depthwise-separable ones (64 to 1024)",
    min_image_size=32,
)
def mobilenet_v1(
    *,
    in_channels: int,
    num_classes: int,
    dropout: float = 0.0,
    width: float = 1.0,
    style: BlockStyle = DEFAULT_STYLE,
) -> BlockNetwork:
    """C32 stride 2 [8], 13 depthwise-separable blocks, global average pool, classifier."""
    blocks: list[Block] = [
        ConvBlock(
            in_channels,
            scaled(width, 32),
            latent_size=8,
            stride=2,
            basis_length=_BASIS_LENGTH,
            style=style,
        )
    ]
    for out_channels, stride, latent_size in _PLAN:
        blocks.append(
            DepthwiseSeparableBlock(
                blocks[-1].out_channels,
                scaled(width, out_channels),
                latent_size=latent_size,
                stride=stride,
                basis_length=_BASIS_LENGTH,
                style=style,
            )
        )
    return BlockNetwork(blocks, pool_size=1, num_classes=num_classes, dropout=dropout)
