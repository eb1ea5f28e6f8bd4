"""BatchNorm by the statistics of the whole batch, of which each replica has a part.

Shapes: N batch, C channels, D replicas; M values of a channel in all replicas together.

Each replica's losses are means over its own n images, and its gradients count n / N in the sum over
replicas (`reduction`). What comes back through the statistics, of which every replica's loss is a
function, is weighed accordingly: with w = n / N, g = dL/dy of a replica's own loss, x^ = (x - mean)
rstd, and sums over all replicas,

    dL/dx = gamma rstd (g - (sum w g + x^ sum w g x^) / (w M))

which for one replica is BatchNorm's own backward.

Source of the combined variance: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances" (1979).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import normalizing
from locallearn.errors import UserError

BatchNorm = nn.modules.batchnorm._BatchNorm

Gather = Callable[[Tensor], Tensor]
"""A tensor of each replica, of one shape, stacked: (D, ...), in their order."""


class SynchronizedNorms:
    """The BatchNorms of a model, in steps of which each replica runs a part.

    Layers in evaluation mode are left as they are.

    Arguments:
        model: whose layers they are.
        gather: from all replicas.
    """

    def __init__(self, model: nn.Module, gather: Gather) -> None:
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self._forwards: dict[nn.Module, Callable[..., Any]] = {
            norm: functools.partial(self._run, norm) for norm in norms
        }
        self._own = {norm: norm.forward for norm in norms}
        self._gather = gather
        self._share = 1.0  # w, of the step that runs

    def total(self, num_images: int) -> int:
        """N, where this replica has so many of them."""
        return int(self._gather(torch.tensor([num_images])).sum())

    @contextlib.contextmanager
    def step(self, num_images: int, total: int) -> Iterator[None]:
        """Within: a training step on n of N images; of none, what it runs on does not count."""
        self._share = num_images / total
        with normalizing(self._forwards):
            yield

    def _run(self, norm: BatchNorm, input: Tensor) -> Tensor:
        if not norm.training:
            output: Tensor = self._own[norm](input)
            return output
        norm._check_input_dim(input)  # type: ignore[no-untyped-call]
        output, mean, var, num_values = _Normalize.apply(
            input, norm.weight, norm.bias, norm.eps, self._share, self._gather
        )
        _update_running(norm, mean, var, num_values)
        return output


class _Normalize(torch.autograd.Function):
    """input, weight, bias, eps, w and gather -> output, mean, biased variance, M.

    Statistics and sums are in float32, or float64 where the input is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        share: float,
        gather: Gather,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_channels = input.shape[1]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        num_values = x.numel() // num_channels if share > 0 else 0
        own = x.new_zeros(2 * num_channels + 1)
        if num_values:
            var, mean = torch.var_mean(x, dim=_axes(x), correction=0)
            own = torch.cat([mean, num_values * var, own[-1:] + num_values])
        means, squares, counts = torch.split(gather(own), [num_channels, num_channels, 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        var = (squares + counts * (means - mean) ** 2).sum(dim=0) / total
        rstd = torch.rsqrt(var + eps)
        output = (x - _wide(mean, x)) * _wide(rstd if weight is None else rstd * weight, x)
        if bias is not None:
            output = output + _wide(bias, x)
        ctx.save_for_backward(input, weight, mean, rstd, total)
        ctx.share, ctx.gather = share, gather
        ctx.mark_non_differentiable(mean, var, total)
        return output.to(input.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        input, weight, mean, rstd, total = ctx.saved_tensors
        share: float = ctx.share
        g, x = grad.to(mean.dtype), input.to(mean.dtype)
        normalized = (x - _wide(mean, x)) * _wide(rstd, x)
        sums = torch.stack([g.sum(dim=_axes(g)), (g * normalized).sum(dim=_axes(g))])
        grad_input = None
        if ctx.needs_input_grad[0]:
            # Without an image of its own a replica adds nothing, whatever it ran on.
            of_all = ctx.gather(share * sums if share else torch.zeros_like(sums)).sum(dim=0)
            if share:
                constant, slope = of_all / (share * total)
                back = g - _wide(constant, x) - normalized * _wide(slope, x)
                back = back * _wide(rstd if weight is None else rstd * weight, x)
                grad_input = back.to(input.dtype)
            else:
                grad_input = torch.zeros_like(input)
        grad_weight = sums[1].to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[0].to(grad_weight.dtype if grad_weight is not None else sums.dtype)
        return (
            grad_input,
            grad_weight,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


@torch.no_grad()
def _update_running(norm: BatchNorm, mean: Tensor, var: Tensor, num_values: Tensor) -> None:
    """As BatchNorm does it, with the unbiased variance; a batch of one value has none."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum: float | Tensor | None = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if momentum is None:
        assert norm.num_batches_tracked is not None
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    unbiased = var * (num_values / (num_values - 1).clamp(min=1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_(momentum * (value.to(running.dtype) - running))


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...)."""
    return channels.view(1, -1, *[1] * (x.ndim - 2))


def check_can_synchronize(*, closed_form: bool, is_compiled: bool, num_accumulated: int) -> None:
    """Raises UserError where BatchNorm's statistics can't be those of all replicas.

    Arguments:
        closed_form: whether blocks are updated in closed form, by a backend that was asked for.
        is_compiled: whether blocks, or the network, run through torch.compile.
        num_accumulated: into how many batches bp cuts one.
    """
    if closed_form:
        raise UserError(
            "synchronized BatchNorm needs backend 'autograd': the closed form normalises by the "
            "replica's own part of the batch. Leave out the backend, or the synchronization."
        )
    if is_compiled:
        raise UserError(
            "synchronized BatchNorm and compile exclude each other: replicas exchange sums in the "
            "middle of a block. Leave one of them out."
        )
    if num_accumulated > 1:
        raise UserError(
            "synchronized BatchNorm and bp_memory 'accumulate' exclude each other: a batch that is "
            "cut up is normalised part by part. Leave one of them out."
        )
