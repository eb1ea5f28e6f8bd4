"""The products of a layer: its output, and the gradients of its weight and of its input.

Shapes: N batch, C channels, H W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_layer(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """z, channels-last where x is."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return torch.ops.aten.convolution(x, weight, *_geometry(layer))  # type: ignore[no-any-return]


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return (None, layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)


def grad_weight(layer: nn.Conv2d | nn.Linear, grad_z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return grad_z.T @ x
    return _conv_backward(layer, grad_z, x, weight, [False, True, False])[1]


def pointwise_grad_weight(layer: nn.Conv2d, grad_z: Tensor, a: Tensor) -> Tensor:
    """dL/dW of a 1x1 convolution: a product of rows, where oneDNN's own way takes up to twice as
    long (1024 channels at 4x4: 6.8 ms against 3.3 on 2 cores)."""
    rows = _rows_of(grad_z, a)
    if rows is None:
        return _conv_backward(layer, grad_z, a, layer.weight.to(a.dtype), [False, True, False])[1]
    grad_rows, a_rows = rows
    return (a_rows.T @ grad_rows).T.view(layer.weight.shape)


def pointwise_grad_input(layer: nn.Conv2d, grad_z: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """dL/da of a 1x1 convolution, over a itself where both lie channels-last."""
    rows = _rows_of(grad_z, a)
    if rows is None:
        return _conv_backward(layer, grad_z, a, weight, [True, False, False])[0]
    grad_rows, a_rows = rows
    torch.mm(grad_rows, weight.flatten(1), out=a_rows)
    return a


def _rows_of(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """(N, C, H, W) as (N H W, C), views; None where one does not lie channels-last."""
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return None
    return tuple(t.permute(0, 2, 3, 1).view(-1, t.shape[1]) for t in tensors)


def _conv_backward(
    layer: nn.Conv2d, grad_z: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad_z, x, weight, *_geometry(layer), wanted
    )
