"""`norm_backward`; see `kernels.interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.kernels.cuda import common
from locallearn.kernels.cuda.common import (
    BATCH,
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
from locallearn.kernels.interface import ChannelStats, NormGradient


@torch.no_grad()
def norm_backward(
    z: Tensor,
    grad_output: Tensor,
    stats: ChannelStats,
    gamma: Tensor,
    beta: Tensor,
    *,
    negative_slope: float,
) -> NormGradient:
    check_dtypes("cuda", z, grad_output)
    grad_z = channels_last(z)
    grad_output = channels_last(grad_output.to(z.dtype))
    num_rows, c = sizes(z).num_rows, sizes(z).num_channels
    constants = per_channel(*stats, gamma, beta)
    vector = vector_of(c, grad_z, grad_output, *constants)
    program = program_of("norm_backward.cu", z.dtype, vector)

    threads, rows_of_a_chunk, num_chunks = common.chunks_for(num_rows, c, vector)
    partial = empty(z, num_chunks, 2, c)
    launch(
        program,
        "partial_gradients",
        (num_chunks, threads.num_blocks),
        threads.block,
        grad_z,
        grad_output,
        partial,
        *constants,
        float(negative_slope),
        num_rows,
        rows_of_a_chunk,
        c,
    )
    gradients = empty(z, c), empty(z, c)
    launch(
        program,
        "sum_gradients",
        (ceil_div(c, common.FINISH_CHANNELS),),
        common.FINISH_BLOCK,
        partial,
        *gradients,
        num_chunks,
        c,
    )
    threads = threads_for(c, vector, slots_for(num_rows, BATCH))
    launch(
        program,
        "norm_backward",
        (ceil_div(num_rows, BATCH * threads.num_slots), threads.num_blocks),
        threads.block,
        grad_z,
        grad_output,
        *constants,
        *gradients,
        float(negative_slope),
        1 / num_rows,
        num_rows,
        c,
    )
    return NormGradient(z if grad_z is z else z.copy_(grad_z), *gradients)
