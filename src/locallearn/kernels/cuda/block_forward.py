"""`block_forward`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.cuda.common import (
    BATCH,
    batch_for,
    channels_last,
    empty,
    per_channel,
    program_of,
    sizes,
    slots_for,
    threads_for,
    vector_of,
)
from locallearn.kernels.cuda.launching import launch
from locallearn.kernels.device_layout import ceil_div, check_dtypes
from locallearn.kernels.interface import BlockForward, ChannelStats, Moments


@torch.no_grad()
def block_forward(
    z: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
    latent_size: int | None,
    max_pool: int = 1,
) -> BlockForward:
    check_dtypes("cuda", z)
    z = channels_last(z)
    n, c, height, width = sizes(z)
    out_height, out_width = height // max_pool, width // max_pool
    output = empty(z, *(n, c, out_height, out_width)[: z.ndim], dtype=z.dtype)
    moments = None
    # Where there are no moments any parts will do: a row of windows for each block.
    cells = (out_height, 1)
    if latent_size is not None:
        cells = (latent_size, latent_size) if z.ndim == 4 else (1, 1)
        shape = (n, c, *cells)[: z.ndim]
        moments = Moments(empty(z, *shape), empty(z, *shape))
    elif not output.numel():
        return BlockForward(output, None)

    constants = per_channel(*stats, gamma, beta)
    vector = vector_of(c, z, output, *constants)
    windows = ceil_div(height, cells[0] * max_pool) * ceil_div(width, cells[1] * max_pool)
    # A window of several positions is a batch by itself.
    most = BATCH if max_pool == 1 else 1
    threads = threads_for(c, vector, slots_for(windows, most))
    batch = batch_for(windows, threads.num_slots, most)
    launch(
        program_of("block_forward.cu", z.dtype, vector, batch=batch, MAX_POOL=max_pool),
        "block_forward",
        (n * cells[0] * cells[1], threads.num_blocks),
        threads.block,
        z,
        output,
        *(moments or (None, None)),
        *constants,
        float(negative_slope),
        height,
        width,
        c,
        *cells,
    )
    return BlockForward(output, moments)
