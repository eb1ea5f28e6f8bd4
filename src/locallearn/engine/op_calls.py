"""The ops that a block's step calls, on tensors of the block's own sizes, and what each must move.

Of a depthwise-separable block the depthwise layer has ops of its own, named so, and the pointwise
one hands a gradient back to it.

Shapes: N batch, C channels, H W height and width, F features, K classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.kernels import ChannelStats, Kernels, ScheduleFreeState
from locallearn.models import Block, BlockNetwork


class OpCall(NamedTuple):
    """run: calls the op; num_bytes: that it must move; num_macs: that it must do, of a convolution
    or a product."""

    run: Callable[[], object]
    num_bytes: int
    num_macs: int


def input_shapes(
    model: BlockNetwork, image_shape: tuple[int, int, int], batch_size: int
) -> list[tuple[str, Block, torch.Size]]:
    """Name, block and input shape of every block, from a forward on the meta device."""
    shapes: dict[str, torch.Size] = {}
    twin = copy.deepcopy(model).to("meta").eval()
    for name, module in twin.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: shapes.update({name: inputs[0].shape})
            )
    with torch.no_grad():
        twin(torch.empty(batch_size, *image_shape, device="meta"))
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, Block)}
    return [(name, blocks[name], shape) for name, shape in shapes.items()]


def calls_of_block(
    block: Block, shape: torch.Size, num_classes: int, kernels: Kernels, dtype: torch.dtype
) -> dict[str, OpCall]:
    """Op -> its call.

    Arguments:
        block: whose norms are BatchNorms; on the device where the ops are to run.
        shape: of its input, (N, C, H, W) or (N, F).
        num_classes: K.
        kernels: whose ops.
        dtype: of activations and weights, as they are computed with.
    """
    *inner, last = block.layers()
    x = torch.randn(shape, device=next(block.parameters()).device).to(dtype)
    calls: dict[str, OpCall] = {}
    parameters: list[Tensor] = []
    for weighted, norm, nonlinearity in inner:
        layer = _Layer(weighted, norm, nonlinearity, x, kernels)
        own = layer.calls(hands_back=False) | layer.inner_calls()
        calls |= {f"depthwise {op}": call for op, call in own.items()}
        x = layer.forward(None, 1).output
        parameters += layer.parameters
    layer = _Layer(*last, x, kernels)
    calls |= layer.calls(hands_back=bool(inner))
    calls |= layer.head_calls(block, num_classes)
    calls["schedulefree_step"] = _update([*parameters, *layer.parameters], kernels)
    return calls


class _Layer:
    """A layer, what stands behind it, and tensors for both."""

    def __init__(
        self,
        weighted: nn.Module,
        norm: nn.Module,
        nonlinearity: nn.Module,
        x: Tensor,
        kernels: Kernels,
    ) -> None:
        assert isinstance(weighted, nn.Conv2d | nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert isinstance(nonlinearity, nn.LeakyReLU)
        self.kernels = kernels
        self.parameters = [p.detach() for p in (weighted.weight, norm.weight, norm.bias)]
        weight, self.gamma, self.beta = self.parameters
        self.slope = nonlinearity.negative_slope
        self.x, self.weight = x, weight.to(x.dtype)
        self.geometry: tuple[Any, ...] = ()
        if isinstance(weighted, nn.Conv2d):
            self.x = x.contiguous(memory_format=torch.channels_last)
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
            of = weighted
            self.geometry = (None, of.stride, of.padding, of.dilation, False, [0, 0], of.groups)
        self.z = self._product()
        self.gradient = torch.randn_like(self.z)
        self.written = self.gradient.clone(memory_format=torch.preserve_format)
        self.running = torch.zeros_like(self.gamma), torch.ones_like(self.gamma)
        self.stats = self._stats()

    def _product(self) -> Tensor:
        if not self.geometry:
            return nn.functional.linear(self.x, self.weight)
        return torch.ops.aten.convolution(self.x, self.weight, *self.geometry)  # type: ignore[no-any-return]

    def _gradients(self, of: list[bool]) -> object:
        if not self.geometry:
            return self.gradient.T @ self.x
        return torch.ops.aten.convolution_backward(
            self.gradient, self.x, self.weight, *self.geometry, of
        )

    def _stats(self) -> ChannelStats:
        return self.kernels.channel_stats(self.z, *self.running, eps=1e-5)

    def forward(self, latent_size: int | None, max_pool: int) -> Any:
        return self.kernels.block_forward(
            self.z,
            self.stats,
            self.gamma,
            self.beta,
            negative_slope=self.slope,
            latent_size=latent_size,
            max_pool=max_pool,
        )

    @property
    def _z_bytes(self) -> int:
        return self.z.numel() * self.z.element_size()

    def calls(self, *, hands_back: bool) -> dict[str, OpCall]:
        """The layer's own products, and the statistics of what it yields."""
        num_macs = self.z.numel() // self.z.shape[1] * self.weight.numel()
        of_weight = functools.partial(self._gradients, [False, True, False])
        calls = {
            "layer": OpCall(self._product, 0, num_macs),
            "channel_stats": OpCall(self._stats, self._z_bytes, 0),
            "weight gradient": OpCall(of_weight, 0, num_macs),
        }
        if hands_back:
            of_input = functools.partial(self._gradients, [True, False, False])
            calls["input gradient"] = OpCall(of_input, 0, num_macs)
        return calls

    def inner_calls(self) -> dict[str, OpCall]:
        """Of a layer that no head reads: the gradient of what it yields comes from behind it."""

        def backward() -> object:
            return self.kernels.norm_backward(
                self.written,
                self.gradient,
                self.stats,
                self.gamma,
                self.beta,
                negative_slope=self.slope,
            )

        # norm_backward reads z and the gradient twice, since its sums come first.
        return {
            "block_forward": OpCall(lambda: self.forward(None, 1), 2 * self._z_bytes, 0),
            "norm_backward": OpCall(backward, 5 * self._z_bytes, 0),
        }

    def head_calls(self, block: Block, num_classes: int) -> dict[str, OpCall]:
        """Of a block's last layer, which its head reads."""
        size, max_pool = block.latent_size, getattr(block.pool, "kernel_size", 1)
        output, moments = self.forward(size, max_pool)
        device = self.z.device
        projection = torch.randn(num_classes, block.latent_length, device=device)
        labels = torch.randint(num_classes, (len(self.z),), device=device)

        def head() -> Any:
            return self.kernels.local_head(
                moments,
                self.gamma,
                self.beta,
                projection,
                labels,
                normalize=True,
                temperature=0.5,
            )

        result = head()

        def backward() -> object:
            return self.kernels.block_backward(
                self.written,
                result.grad_latents,
                self.stats,
                self.gamma,
                self.beta,
                result.grad_gamma,
                result.grad_beta,
                negative_slope=self.slope,
            )

        moment_bytes = 4 * moments.s0.numel()
        output_bytes = output.numel() * output.element_size()
        return {
            "block_forward": OpCall(
                lambda: self.forward(size, max_pool),
                self._z_bytes + output_bytes + 2 * moment_bytes,
                0,
            ),
            "local_head": OpCall(head, 3 * moment_bytes + 2 * 4 * projection.numel(), 0),
            "block_backward": OpCall(backward, 2 * self._z_bytes + moment_bytes, 0),
        }


def _update(parameters: list[Tensor], kernels: Kernels) -> OpCall:
    y = [p.clone(memory_format=torch.preserve_format) for p in parameters]
    gradients, z, exp_avg_sq = ([torch.rand_like(p) for p in y] for _ in range(3))
    one = torch.ones((), dtype=torch.float64, device=y[0].device)
    clock = ScheduleFreeState(one * 10, one.clone(), one * 0.005, one * 0.005)

    def run() -> None:
        kernels.schedulefree_step(
            y,
            gradients,
            z,
            exp_avg_sq,
            clock,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
        )

    # Reads y, gradient, z and v; writes y, z and v.
    return OpCall(run, 7 * 4 * sum(p.numel() for p in y), 0)
