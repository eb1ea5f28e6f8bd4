"""SmallConv and SmallConvL: three convolutional blocks and a linear one.

Source: LLS (arXiv 2405.15868), tables 1 and 2; sizes from the authors' code.
"""

from __future__ import annotations

from typing import Any

from locallearn.models.blocks import DEFAULT_STYLE, BlockStyle, ConvBlock, LinearBlock, scaled
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import register_model


@register_model(
    "smallconv", summary="3 conv blocks (32, 64, 128) and a linear one (512)", min_image_size=8
)
def smallconv(**settings: Any) -> BlockNetwork:
    """C32 [4], MaxPool, C64 [2], MaxPool, C128 [2], pool 2x2, Linear 512 [512]."""
    return _smallconv((32, 64, 128), 512, 512, **settings)


@register_model(
    "smallconv-l", summary="3 conv blocks (96, 192, 512) and a linear one (1024)", min_image_size=8
)
def smallconv_l(**settings: Any) -> BlockNetwork:
    """C96 [4], MaxPool, C192 [2], MaxPool, C512 [2], pool 2x2, Linear 1024 [2048].

    The linear block's latent is longer than its 1024 features, as in the authors' code: each
    feature stands in it twice.
    """
    return _smallconv((96, 192, 512), 1024, 2048, **settings)


def _smallconv(
    widths: tuple[int, int, int],
    num_features: int,
    latent_size: int,
    *,
    in_channels: int,
    num_classes: int,
    dropout: float = 0.0,
    width: float = 1.0,
    style: BlockStyle = DEFAULT_STYLE,
) -> BlockNetwork:
    c1, c2, c3 = (scaled(width, channels) for channels in widths)
    return BlockNetwork(
        [
            ConvBlock(in_channels, c1, latent_size=4, max_pool=2, style=style),
            ConvBlock(c1, c2, latent_size=2, max_pool=2, style=style),
            ConvBlock(c2, c3, latent_size=2, style=style),
        ],
        pool_size=2,
        linear_blocks=[
            LinearBlock(
                c3 * 4,
                scaled(width, num_features),
                latent_size=scaled(width, latent_size),
                style=style,
            )
        ],
        num_classes=num_classes,
        dropout=dropout,
    )
