"""`channel_stats`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.cuda import common
from locallearn.kernels.cuda.common import channels_last, empty, program_of, sizes, vector_of
from locallearn.kernels.cuda.launching import launch
from locallearn.kernels.device_layout import ceil_div, check_dtypes
from locallearn.kernels.interface import ChannelStats


@torch.no_grad()
def channel_stats(
    z: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float,
    momentum: float = 0.1,
) -> ChannelStats:
    check_dtypes("cuda", z)
    z = channels_last(z)
    num_rows, c = sizes(z).num_rows, sizes(z).num_channels
    vector = vector_of(c, z)
    program = program_of("channel_stats.cu", z.dtype, vector)
    threads, rows_of_a_chunk, num_chunks = common.chunks_for(num_rows, c, vector)
    partial = empty(z, num_chunks, 3, c)
    launch(
        program,
        "chunk_stats",
        (num_chunks, threads.num_blocks),
        threads.block,
        z,
        partial,
        num_rows,
        rows_of_a_chunk,
        c,
    )
    stats = ChannelStats(empty(z, c), empty(z, c))
    launch(
        program,
        "channel_stats",
        (ceil_div(c, common.FINISH_CHANNELS),),
        common.FINISH_BLOCK,
        partial,
        *stats,
        running_mean,
        running_var,
        float(momentum),
        float(eps),
        num_rows,
        rows_of_a_chunk,
        num_chunks,
        c,
    )
    return stats
