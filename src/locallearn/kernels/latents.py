"""Pooled latents of a block's output, and the adjoint of the pooling.

Shapes: N batch, C channels, H W height and width, F features, s pooling size, T latent length.

The adjoint is an op of its own, and not left to autograd, for speed: the gradient of the latents is
known in closed form, so nothing about the pooling needs recording, and where the windows do not
overlap it is a plain repeat. For a (128, 32, 32, 32) channels-last output on 2 CPU cores the
repeat takes a sixth of `adaptive_avg_pool2d`'s own backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_latents(activation: Tensor, size: int) -> Tensor:
    """Adaptive average pooling of a block's output, flattened: the latent p.

    Arguments:
        activation: (N, C, H, W) for a convolutional block or (N, F) for a linear one; floating.
        size: pooled height and width (s) for 4-d outputs, pooled length (T) for 2-d ones.

    Returns:
        (N, C*s*s) or (N, T), same dtype. Windows overlap where H or W is no multiple of s.

    Raises:
        ValueError: if ``activation`` is neither 2-d nor 4-d.

    Source: LLS (arXiv 2405.15868), section 3; the authors pool every local head alike.
    """
    rows = _pooled_rows(activation, size)
    if activation.ndim == 2:
        if activation.shape[1] == size:
            return activation
        return F.adaptive_avg_pool2d(activation[:, None, None, :], (rows, size)).flatten(1)
    return F.adaptive_avg_pool2d(activation, (rows, size)).flatten(1)


def unpool_latents(grad_latents: Tensor, activation: Tensor, size: int) -> Tensor:
    """The adjoint of :func:`pool_latents`: dL/dp to dL/dh.

    Each position receives the sum, over the windows that hold it, of that window's gradient
    divided by the window's own size.

    Arguments:
        grad_latents: (N, T), any floating dtype.
        activation: what was pooled; gives shape, dtype and memory format (values are not read).
        size: as in :func:`pool_latents`.

    Returns:
        A tensor shaped and typed like ``activation``.
    """
    rows = _pooled_rows(activation, size)
    grad = grad_latents.to(activation.dtype)
    if activation.ndim == 2:
        if activation.shape[1] == size:
            return grad
        return _unpool(grad[:, None, None, :], activation[:, None, None, :], rows, size).flatten(1)
    n, c = activation.shape[:2]
    return _unpool(grad.view(n, c, rows, size), activation, rows, size)


def _unpool(grad: Tensor, activation: Tensor, rows: int, columns: int) -> Tensor:
    n, c, h, w = activation.shape
    if h % rows or w % columns:  # overlapping or repeated windows
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad, activation)  # type: ignore[no-any-return]
    cell_h, cell_w = h // rows, w // columns
    grad = grad / (cell_h * cell_w)
    if activation.is_contiguous(memory_format=torch.channels_last):
        cells = grad.permute(0, 2, 3, 1)[:, :, None, :, None, :]  # (N, s, 1, s, 1, C)
        full = cells.expand(n, rows, cell_h, columns, cell_w, c).reshape(n, h, w, c)
        return full.permute(0, 3, 1, 2)
    cells = grad[:, :, :, None, :, None]  # (N, C, s, 1, s, 1)
    return cells.expand(n, c, rows, cell_h, columns, cell_w).reshape(n, c, h, w)


def _pooled_rows(activation: Tensor, size: int) -> int:
    """Pooled height: s for (N, C, H, W), 1 for (N, F), which pools along its features alone."""
    if activation.ndim not in (2, 4):
        raise ValueError(
            f"a block's output must be (N, C, H, W) or (N, F) to be pooled into latents, "
            f"got shape {tuple(activation.shape)}"
        )
    return size if activation.ndim == 4 else 1
