"""`block_backward`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.cuda.common import (
    BATCH,
    batch_for,
    channels_last,
    per_channel,
    program_of,
    sizes,
    slots_for,
    threads_for,
    vector_of,
)
from locallearn.kernels.cuda.launching import launch
from locallearn.kernels.device_layout import ceil_div, check_dtypes
from locallearn.kernels.interface import ChannelStats


@torch.no_grad()
def block_backward(
    z: Tensor,
    grad_latents: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    *,
    negative_slope: float,
) -> Tensor:
    check_dtypes("cuda", z, grad_latents)
    grad_z = channels_last(z)
    grad = channels_last(grad_latents.to(torch.float32))
    n, c, height, width = sizes(z)
    cells = sizes(grad)[2:]
    overlaps = height % cells[0] > 0 or width % cells[1] > 0
    constants = per_channel(*stats, gamma, beta, grad_gamma, grad_beta)
    vector = vector_of(c, grad_z, grad, *constants)
    positions = ceil_div(height, cells[0]) * ceil_div(width, cells[1])
    # More would not fit in the registers beside what is summed over cells.
    most = 2 if overlaps else BATCH
    threads = threads_for(c, vector, slots_for(positions, most))
    batch = batch_for(positions, threads.num_slots, most)
    launch(
        program_of("block_backward.cu", z.dtype, vector, batch=batch, OVERLAP=int(overlaps)),
        "block_backward",
        (n * cells[0] * cells[1], threads.num_blocks),
        threads.block,
        grad_z,
        grad,
        *constants,
        float(negative_slope),
        1 / (n * height * width) if z.numel() else 0.0,
        height,
        width,
        c,
        *cells,
    )
    return z if grad_z is z else z.copy_(grad_z)
