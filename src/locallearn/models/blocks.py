"""Blocks: conv or linear, BatchNorm, LeakyReLU and the max-pool that follows.

Shapes: N batch, C channels, H W height and width, F features, s pooling size, T latent length.

A convolution or linear layer with a BatchNorm behind it has no bias: that would be subtracted
again, and its gradient, zero but for rounding, would only make Adam walk at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from locallearn.errors import UserError, unknown_name

NEGATIVE_SLOPE = 0.01  # of every LeakyReLU, as in the authors' code
ACTIVATIONS = ("leaky-relu", "relu", "tanh")
NORMS = ("batch", "none")


@dataclass(frozen=True)
class BlockStyle:
    """What stands behind each convolution and linear layer of a network's blocks.

    Arguments:
        activation: "leaky-relu" (slope 0.01, the LLS authors'), "relu" or "tanh" (DRTP's).
        norm: "batch", or "none", where the layer has a bias instead.
    """

    activation: str = "leaky-relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)

    @property
    def has_bias(self) -> bool:
        """Whether layers have a bias."""
        return self.norm == "none"

    def build_norm(self, num_channels: int, *, is_linear: bool = False) -> nn.Module:
        """For (N, C, H, W), or (N, F)."""
        if self.norm == "none":
            return nn.Identity()
        return nn.BatchNorm1d(num_channels) if is_linear else nn.BatchNorm2d(num_channels)

    def build_activation(self) -> nn.Module:
        """In place: what the layer before keeps is its own input."""
        if self.activation == "tanh":
            return nn.Tanh()
        if self.activation == "relu":
            return nn.ReLU(inplace=True)
        return nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)


DEFAULT_STYLE = BlockStyle()


class Layer(NamedTuple):
    """A layer with weights, and what stands behind it: ``nonlinearity(norm(weighted(x)))``."""

    weighted: nn.Module
    norm: nn.Module
    nonlinearity: nn.Module


def scaled(width: float, num_channels: int) -> int:
    """A number of channels of a network whose blocks are ``width`` times as wide.

    Raises:
        UserError: a width that is not above 0.
    """
    if not 0 < width < math.inf:
        raise UserError(f"width must be above 0, got {width}.")
    return max(1, round(width * num_channels))


class Block(nn.Module):
    """A unit of locality: it learns from its own activation, and hands on what it makes of it.

    ``forward(x)`` is ``downsample(activation(x))``. A local rule reads the activation, before any
    max-pooling, pooled to ``latent_size``.

    Attributes:
        out_channels: channels (or features) of the activation.
        latent_size: s, pooled height and width of a 4-d activation; T for a 2-d one.
        latent_length: T.
        basis_length: length at which a random basis is drawn before it is pooled to T (the
            authors' ``hidden_dim``); None means T.
        is_linear: whether the activation is (N, F).
    """

    is_linear: bool = False

    def __init__(
        self,
        out_channels: int,
        *,
        latent_size: int,
        latent_length: int,
        basis_length: int | None = None,
        max_pool: int = 1,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.latent_size = latent_size
        self.latent_length = latent_length
        self.basis_length = basis_length
        self.pool: nn.Module = nn.MaxPool2d(max_pool) if max_pool > 1 else nn.Identity()

    def activation(self, x: Tensor) -> Tensor:
        """The block's output h before max-pooling, which the local rule reads."""
        raise NotImplementedError

    def downsample(self, activation: Tensor) -> Tensor:
        """The next block's input, made of the activation. Has no parameters."""
        pooled: Tensor = self.pool(activation)
        return pooled

    def layers(self) -> list[Layer]:
        """What :meth:`activation` runs, one after the other."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.activation(x))


class ConvBlock(Block):
    """Conv2d 3x3 (padding 1) -> BatchNorm2d -> LeakyReLU [-> MaxPool2d], or as the style says.

    Arguments:
        in_channels, out_channels: C of the input and of the output.
        latent_size: s; the rule sees C*s*s values.
        stride: of the convolution.
        max_pool: window and stride of the max-pool that follows; 1 for none.
        basis_length: see :class:`Block`.
        style: normalisation and activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        latent_size: int,
        stride: int = 1,
        max_pool: int = 1,
        basis_length: int | None = None,
        style: BlockStyle = DEFAULT_STYLE,
    ) -> None:
        super().__init__(
            out_channels,
            latent_size=latent_size,
            latent_length=out_channels * latent_size**2,
            basis_length=basis_length,
            max_pool=max_pool,
        )
        self.conv = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, bias=style.has_bias
        )
        self.norm = style.build_norm(out_channels)
        self.nonlinearity = style.build_activation()

    def activation(self, x: Tensor) -> Tensor:
        h: Tensor = self.nonlinearity(self.norm(self.conv(x)))
        return h

    def layers(self) -> list[Layer]:
        return [Layer(self.conv, self.norm, self.nonlinearity)]


class LinearBlock(Block):
    """Linear -> BatchNorm1d -> LeakyReLU, or as the style says.

    Arguments:
        in_features, out_features: F of the input and of the output.
        latent_size: T; the features are average-pooled to it, or repeated where T > F.
        basis_length: see :class:`Block`.
        style: normalisation and activation.
    """

    is_linear = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        latent_size: int,
        basis_length: int | None = None,
        style: BlockStyle = DEFAULT_STYLE,
    ) -> None:
        super().__init__(
            out_features,
            latent_size=latent_size,
            latent_length=latent_size,
            basis_length=basis_length,
        )
        self.linear = nn.Linear(in_features, out_features, bias=style.has_bias)
        self.norm = style.build_norm(out_features, is_linear=True)
        self.nonlinearity = style.build_activation()

    def activation(self, x: Tensor) -> Tensor:
        h: Tensor = self.nonlinearity(self.norm(self.linear(x)))
        return h

    def layers(self) -> list[Layer]:
        return [Layer(self.linear, self.norm, self.nonlinearity)]


class DepthwiseSeparableBlock(Block):
    """Depthwise 3x3 -> BatchNorm -> LeakyReLU -> pointwise 1x1 -> BatchNorm -> LeakyReLU.

    The two convolutions learn together, from the pointwise output: within a block,
    backpropagation goes on.

    Arguments:
        in_channels, out_channels: C of the input and of the output.
        latent_size: s.
        stride: of the depthwise convolution (padding 1; the authors pad by the stride, a slip).
        basis_length: see :class:`Block`.
        style: normalisation and activation.

    Source: Howard et al., "MobileNets", arXiv 1704.04861, figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        latent_size: int,
        stride: int = 1,
        basis_length: int | None = None,
        style: BlockStyle = DEFAULT_STYLE,
    ) -> None:
        super().__init__(
            out_channels,
            latent_size=latent_size,
            latent_length=out_channels * latent_size**2,
            basis_length=basis_length,
        )
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            stride=stride,
            padding=1,
            groups=in_channels,
            bias=style.has_bias,
        )
        self.depthwise_norm = style.build_norm(in_channels)
        self.depthwise_nonlinearity = style.build_activation()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=style.has_bias)
        self.norm = style.build_norm(out_channels)
        self.nonlinearity = style.build_activation()

    def activation(self, x: Tensor) -> Tensor:
        x = self.depthwise_nonlinearity(self.depthwise_norm(self.depthwise(x)))
        h: Tensor = self.nonlinearity(self.norm(self.pointwise(x)))
        return h

    def layers(self) -> list[Layer]:
        return [
            Layer(self.depthwise, self.depthwise_norm, self.depthwise_nonlinearity),
            Layer(self.pointwise, self.norm, self.nonlinearity),
        ]
