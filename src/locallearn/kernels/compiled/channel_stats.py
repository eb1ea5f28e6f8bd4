"""`channel_stats`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.compiled.compilation import open_rows, rows_of, specialized
from locallearn.kernels.interface import ChannelStats
from locallearn.kernels.reference.channel_stats import update_running, wide


def _channel_stats(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    # Deviations from the first image's mean, so that a mean far from zero costs no digits. Summed
    # image by image first: the loops then run over memory in order, and in parallel over images.
    shift = rows[0].to(wide(rows.dtype)).mean(0)
    deviation = rows.to(shift.dtype) - shift
    total = deviation.sum(1).sum(0)
    squares = (deviation * deviation).sum(1).sum(0)
    num_values = rows.shape[0] * rows.shape[1]
    mean_deviation = total / num_values
    var = (squares / num_values - mean_deviation * mean_deviation).clamp_min(0)
    mean = shift + mean_deviation
    update_running(mean, var, num_values, running_mean, running_var, momentum)
    return mean, torch.rsqrt(var + eps)


@torch.no_grad()
def channel_stats(
    z: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float,
    momentum: float = 0.1,
) -> ChannelStats:
    rows = rows_of(z).reshape(z.shape[0], -1, z.shape[1])
    left = open_rows(rows)
    key = (*left, rows.dtype, running_mean is None, running_var is None, eps, momentum)
    return ChannelStats(
        *specialized(_channel_stats, *key)(rows, running_mean, running_var, eps, momentum)
    )
