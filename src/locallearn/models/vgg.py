"""VGG8 and VGG11 with BatchNorm.

Source: LLS (arXiv 2405.15868), tables 1 and 3; sizes from the authors' code.
"""

from __future__ import annotations

from locallearn.models.blocks import ConvBlock, LinearBlock
from locallearn.models.network import BlockNetwork
from locallearn.models.registry import register_model

# Random bases are drawn at this length and pooled to each block's own (the authors' hidden_dim).
_BASIS_LENGTH = 2048


@register_model(
    "vgg8", summary="6 conv blocks (128 to 512) and a linear one (1024)", min_image_size=16
)
def vgg8(*, in_channels: int, num_classes: int, dropout: float = 0.0) -> BlockNetwork:
    """C128 [4], C256 [2], M, C256 [2], C256 [2], M, C512 [2], M, C512 [2], Linear 1024 [1024]."""
    plan = [(128, 4, 1), (256, 2, 2), (256, 2, 1), (256, 2, 2), (512, 2, 2), (512, 2, 1)]
    linear = LinearBlock(2048, 1024, latent_size=1024, basis_length=_BASIS_LENGTH)
    return _vgg(plan, [linear], in_channels, num_classes, dropout)


@register_model(
    "vgg11", summary="8 conv blocks (64 to 512) and two linear ones (4096)", min_image_size=32
)
def vgg11(*, in_channels: int, num_classes: int, dropout: float = 0.0) -> BlockNetwork:
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
    linear = [
        LinearBlock(2048, 4096, latent_size=2048, basis_length=_BASIS_LENGTH),
        LinearBlock(4096, 4096, latent_size=2048, basis_length=_BASIS_LENGTH),
    ]
    return _vgg(plan, linear, in_channels, num_classes, dropout)


def _vgg(
    plan: list[tuple[int, int, int]],
    linear_blocks: list[LinearBlock],
    in_channels: int,
    num_classes: int,
    dropout: float,
) -> BlockNetwork:
    """``plan``: (out_channels, latent_size, max_pool) of each convolutional block."""
    conv_blocks = []
    for out_channels, latent_size, max_pool in plan:
        conv_blocks.append(
            ConvBlock(
                in_channels,
                out_channels,
                latent_size=latent_size,
                max_pool=max_pool,
                basis_length=_BASIS_LENGTH,
            )
        )
        in_channels = out_channels
    return BlockNetwork(
        conv_blocks,
        pool_size=2,
        linear_blocks=linear_blocks,
        num_classes=num_classes,
        dropout=dropout,
    )
