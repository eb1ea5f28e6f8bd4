"""Blocks updated in closed form: no autograd graph, nothing kept (docs/closed-form.md).

Shapes: N batch, C channels, H W height and width, F features, s pooling size, T latent length.

One pass over the layer's output z gives the next block's input and the pooled moments, from which
the tiny head makes the loss and every gradient but that of z; a second pass overwrites z with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import ClosedForm, NormalizedLayer, observer_of
from locallearn.engine.units.base import UnitResult, UnitSignal, num_correct
from locallearn.engine.units.generic import GenericUnit
from locallearn.engine.units.layers import (
    apply_layer,
    grad_weight,
    pointwise_grad_input,
    pointwise_grad_weight,
)
from locallearn.errors import UserError
from locallearn.kernels import (
    ChannelStats,
    Kernels,
    Moments,
    moment_gradients,
    moment_latents,
    pool_latents,
    unpool_latents,
)
from locallearn.rules import LatentHead, ProjectionHead, accumulate_grad


class _HeadGradients(NamedTuple):
    """What a head says to the closed form; grad_latents is shaped like the moments."""

    signal: UnitSignal
    grad_latents: Tensor
    grad_gamma: Tensor
    grad_beta: Tensor


class _Normalized:
    """BatchNorm and (Leaky)ReLU behind a layer, as the kernels take them.

    The layer's bias, where it has one, is left out of z: the norm subtracts it again. It does not
    learn, its gradient being zero, and shows in the running mean alone.
    """

    def __init__(self, normalized: NormalizedLayer) -> None:
        self.norm = normalized.norm
        self.layer = normalized.layer
        self.gamma, self.beta = self.norm.weight, self.norm.bias
        self.slope = normalized.negative_slope

    @property
    def is_constant(self) -> bool:
        """Whether it normalises by running statistics in this step; see `engine.statistics`."""
        return observer_of(self.norm) is not None

    def stats(self, z: Tensor, kernels: Kernels) -> ChannelStats:
        norm = self.norm
        if (observer := observer_of(norm)) is not None:
            return self._running_stats(z, observer)
        if z.numel() == z.shape[1]:
            raise UserError(
                f"BatchNorm has one value for each channel of {tuple(z.shape)}, which has no "
                f"variance; a batch of at least 2 is expected."
            )
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        assert norm.momentum is not None
        stats = kernels.channel_stats(
            z, norm.running_mean, norm.running_var, eps=norm.eps, momentum=norm.momentum
        )
        if self.layer.bias is not None:
            if norm.running_mean is not None:
                norm.running_mean.add_(self.layer.bias.detach(), alpha=norm.momentum)
            _give(self.layer.bias, torch.zeros_like(self.layer.bias))
        return stats

    def _running_stats(self, z: Tensor, observer: Callable[..., None]) -> ChannelStats:
        """The running statistics, once they have taken z in; without the layer's bias, as z is."""
        norm, bias = self.norm, self.layer.bias
        bias = None if bias is None else bias.detach()
        observer(z, bias)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # New tensors: the layer may run again while another stream still reads these.
        mean = norm.running_mean.clone() if bias is None else norm.running_mean - bias
        return ChannelStats(mean, torch.rsqrt(norm.running_var + norm.eps))

    def zeros(self) -> Tensor:
        """(C,): what constant statistics take from the gradient."""
        assert self.norm.running_mean is not None
        return torch.zeros_like(self.norm.running_mean)


class ClosedFormUnit(GenericUnit):
    """Convolution or linear layer, BatchNorm, (Leaky)ReLU: see the top of this file.

    Arguments:
        form: what the block is made of.
        side_stream: a CUDA stream for all that the next block does not wait for: head, backward,
            weight gradient and update. None runs them in line. The learner waits for it at the
            end of the step.

    Where the backend is "autograd", it is a generic unit.
    """

    def __init__(
        self,
        *,
        form: ClosedForm,
        side_stream: torch.cuda.Stream | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        assert isinstance(self.latent_size, int)
        self._size: int = self.latent_size
        self._form = form
        self._normalized = _Normalized(form.last)
        self._norms = [part.norm for part in (form.inner, form.last) if part is not None]
        self._side_stream = side_stream

    @property
    def path(self) -> str:
        return "generic" if self.backend == "autograd" else "closed form"

    def step(self, labels: Tensor, *args: Any, **kwargs: Any) -> UnitResult:
        # A BatchNorm in evaluation mode normalises by its running statistics.
        is_covered = all(norm.training for norm in self._norms) or self._is_constant
        if self.backend == "autograd" or not is_covered:
            return super().step(labels, *args, **kwargs)
        (x,) = (*args, *kwargs.values())
        with torch.no_grad():
            return self._closed_form(labels, x)

    @property
    def _is_constant(self) -> bool:
        """Whether the statistics are constants, in a block of one layer: see `_grad_z`."""
        return self._form.inner is None and self._normalized.is_constant

    def _closed_form(self, labels: Tensor, x: Tensor) -> UnitResult:
        layer = self._form.last.layer
        with _computing(x) as x:
            weight = layer.weight.to(x.dtype)
            z = apply_layer(layer, x, weight)
            output, stats, moments = self._forward(z)
            with self._aside(x, weight, z, *stats, *moments):
                head = self._learn(moments, labels)
                # The batch's own statistics would take it out again.
                bias = layer.bias if self._is_constant else None
                learns_bias = bias is not None and bias.requires_grad
                if layer.weight.requires_grad or learns_bias:
                    grad_z = self._grad_z(z, head, stats)
                    if bias is not None:
                        axes = [0, *range(2, grad_z.ndim)]
                        _give(bias, grad_z.sum(axes, dtype=bias.dtype))
                    if layer.weight.requires_grad:
                        _give(layer.weight, grad_weight(layer, grad_z, x, weight))
                    del grad_z
                del z
                self._update()
        return UnitResult(output, head.signal)

    def _forward(self, z: Tensor) -> tuple[Tensor, ChannelStats, Moments]:
        self.num_elements = z.numel()
        normalized = self._normalized
        stats = normalized.stats(z, self.kernels)
        output, moments = self.kernels.block_forward(
            z,
            stats,
            normalized.gamma,
            normalized.beta,
            negative_slope=normalized.slope,
            latent_size=self._size,
            max_pool=self._form.max_pool,
        )
        assert moments is not None
        return output, stats, moments

    def _learn(self, moments: Moments, labels: Tensor) -> _HeadGradients:
        """The head; afterwards gamma, beta and the head's own parameters have their gradients."""
        result = self._signal(moments, labels)
        _give(self._normalized.gamma, result.grad_gamma)
        _give(self._normalized.beta, result.grad_beta)
        return result

    def _signal(self, moments: Moments, labels: Tensor) -> _HeadGradients:
        gamma, beta, head = self._normalized.gamma, self._normalized.beta, self.head
        if isinstance(head, ProjectionHead) and head.has_closed_form:
            result = self.kernels.local_head(
                moments,
                gamma,
                beta,
                head.projection(),
                labels,
                normalize=head.normalize,
                temperature=head.temperature,
                label_smoothing=head.label_smoothing,
                similarity=head.similarity,
                needs_grad_projection=head.is_trained,
            )
            if result.grad_projection is not None:
                head.projection_backward(result.grad_projection)
            return _HeadGradients(
                UnitSignal(result.loss, result.logits, result.num_correct),
                result.grad_latents,
                result.grad_gamma,
                result.grad_beta,
            )
        assert isinstance(head, LatentHead)
        unpooled = moment_latents(moments, gamma, beta)
        is_linear = unpooled.ndim == 2
        latents = pool_latents(unpooled, self.latent_size) if is_linear else unpooled.flatten(1)
        loss, logits, grad = head.signal(latents, labels)
        if is_linear:
            grad = unpool_latents(grad, unpooled, self.latent_size)
        grad = grad.view(unpooled.shape)
        signal = UnitSignal(loss, logits, num_correct(logits, labels))
        return _HeadGradients(signal, grad, *moment_gradients(moments, grad))

    def _grad_z(self, z: Tensor, head: _HeadGradients, stats: ChannelStats) -> Tensor:
        """dL/dz, in z's memory. Of constant statistics dL/dgamma and dL/dbeta are no part of it."""
        normalized = self._normalized
        grads = (head.grad_gamma, head.grad_beta)
        if self._is_constant:
            grads = (normalized.zeros(),) * 2
        return self.kernels.block_backward(
            z,
            head.grad_latents,
            stats,
            normalized.gamma,
            normalized.beta,
            *grads,
            negative_slope=normalized.slope,
        )

    def _aside(self, *tensors: Tensor) -> contextlib.AbstractContextManager[Any]:
        """On the side stream, after what the current one has been given so far."""
        if self._side_stream is None:
            return contextlib.nullcontext()
        self._side_stream.wait_stream(torch.cuda.current_stream(self._side_stream.device))
        for tensor in tensors:
            tensor.record_stream(self._side_stream)
        return torch.cuda.stream(self._side_stream)


class DepthwiseSeparableUnit(ClosedFormUnit):
    """The closed form at the last BatchNorm; below it, backpropagation inside the block.

    The inner convolution is a depthwise one as a rule, but may be any; the last one is pointwise.
    u is the depthwise convolution's output, a the activation made of it, z the pointwise one's.
    Every gradient overwrites what is done with: that of z lies in z, of a in a, of u in u.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        assert self._form.inner is not None
        assert isinstance(self._form.inner.layer, nn.Conv2d)
        assert isinstance(self._form.last.layer, nn.Conv2d)
        self._inner = _Normalized(self._form.inner)
        self._depthwise, self._pointwise = self._form.inner.layer, self._form.last.layer

    def _closed_form(self, labels: Tensor, x: Tensor) -> UnitResult:
        depthwise, pointwise = self._depthwise, self._pointwise
        kernels, inner = self.kernels, self._inner
        with _computing(x) as x:
            depthwise_weight = depthwise.weight.to(x.dtype)
            pointwise_weight = pointwise.weight.to(x.dtype)
            u = apply_layer(depthwise, x, depthwise_weight)
            inner_stats = inner.stats(u, kernels)
            a, _ = kernels.block_forward(
                u,
                inner_stats,
                inner.gamma,
                inner.beta,
                negative_slope=inner.slope,
                latent_size=None,
            )
            z = apply_layer(pointwise, a, pointwise_weight)
            output, stats, moments = self._forward(z)
            below = (depthwise.weight, inner.gamma, inner.beta)
            with self._aside(
                x, depthwise_weight, pointwise_weight, u, a, z, *inner_stats, *stats, *moments
            ):
                head = self._learn(moments, labels)
                grad_z = self._grad_z(z, head, stats)
                if pointwise.weight.requires_grad:
                    gradient = pointwise_grad_weight(pointwise, grad_z, a)
                    _give(pointwise.weight, gradient)
                if any(p.requires_grad for p in below):
                    grad_a = pointwise_grad_input(pointwise, grad_z, a, pointwise_weight)
                    del z, grad_z, a
                    grad_u, grad_gamma, grad_beta = kernels.norm_backward(
                        u,
                        grad_a,
                        inner_stats,
                        inner.gamma,
                        inner.beta,
                        negative_slope=inner.slope,
                    )
                    del grad_a
                    _give(inner.gamma, grad_gamma)
                    _give(inner.beta, grad_beta)
                    if depthwise.weight.requires_grad:
                        gradient = grad_weight(depthwise, grad_u, x, depthwise_weight)
                        _give(depthwise.weight, gradient)
                self._update()
        return UnitResult(output, head.signal)


@contextlib.contextmanager
def _computing(x: Tensor) -> Iterator[Tensor]:
    """Within: no autocast; yields x, detached, in the dtype that autocast computes in."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        yield x.detach().to(dtype)


def _give(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.requires_grad:
        assert isinstance(parameter, nn.Parameter)
        accumulate_grad(parameter, gradient.to(parameter.dtype))
