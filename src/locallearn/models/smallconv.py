"""SmallConv and SmallConvL: three convolutional blocks and a linear one.

Source: LLS (arXiv 2405.15868), tables 1 and 2; sizes from the authors' code.
"""

from __future__ import annotations

from locallearn.models.blocks import ConvBlock, LinearBlock
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import register_model


@register_model(
    "smallconv", summary="3 conv blocks (32, 64, 128) and a linear one (512)", min_image_size=8
)
def smallconv(*, in_channels: int, num_classes: int, dropout: float = 0.0) -> BlockNetwork:
    """C32 [4], MaxPool, C64 [2], MaxPool, C128 [2], pool 2x2, Linear 512 [512]."""
    return _smallconv(
        (32, 64, 128), 512, 512, in_channels=in_channels, num_classes=num_classes, dropout=dropout
    )


@register_model(
    "smallconv-l", summary="3 conv blocks (96, 192, 512) and a linear one (1024)", min_image_size=8
)
def smallconv_l(*, in_channels: int, num_classes: int, dropout: float = 0.0) -> BlockNetwork:
    """C96 [4], MaxPool, C192 [2], MaxPool, C512 [2], pool 2x2, Linear 1024 [2048].

    The linear block's latent is longer than its 1024 features, as in the authors' code: each
    feature stands in it twice.
    """
    return _smallconv(
        (96, 192, 512),
        1024,
        2048,
        in_channels=in_channels,
        num_classes=num_classes,
        dropout=dropout,
    )


def _smallconv(
    widths: tuple[int, int, int],
    num_features: int,
    latent_size: int,
    *,
    in_channels: int,
    num_classes: int,
    dropout: float,
) -> BlockNetwork:
    c1, c2, c3 = widths
    return BlockNetwork(
        [
            ConvBlock(in_channels, c1, latent_size=4, max_pool=2),
            ConvBlock(c1, c2, latent_size=2, max_pool=2),
            ConvBlock(c2, c3, latent_size=2),
        ],
        pool_size=2,
        linear_blocks=[LinearBlock(c3 * 4, num_features, latent_size=latent_size)],
        num_classes=num_classes,
        dropout=dropout,
    )
