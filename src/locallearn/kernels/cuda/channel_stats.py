"""`channel_stats`; see `kernels.interface`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from locallearn.kernels.cuda import common
from locallearn.kernels.cuda.common import NAMES, channels_last, empty, sizes, vector_of
from locallearn.kernels.cuda.compilation import program
from locallearn.kernels.cuda.launching import address, launch
from locallearn.kernels.device_layout import ceil_div, check_dtypes
from locallearn.kernels.interface import ChannelStats


class _Running(ctypes.Structure):
    _fields_ = (
        ("mean", ctypes.c_void_p),
        ("var", ctypes.c_void_p),
        ("momentum", ctypes.c_float),
    )


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
    threads, rows_of_a_chunk, num_chunks = common.chunks_for(num_rows, c, vector)
    partial = empty(z, 3, num_chunks, c) if num_chunks > 1 else None
    mean, inv_std = empty(z, c), empty(z, c)
    running = _Running(address(running_mean), address(running_var), momentum)
    compiled = program("channel_stats.cu", ELEMENT=NAMES[z.dtype], VECTOR=vector)
    launch(
        compiled,
        "channel_stats",
        (num_chunks, threads.num_blocks),
        threads.block,
        z,
        partial,
        mean,
        inv_std,
        running,
        float(eps),
        num_rows,
        rows_of_a_chunk,
        c,
    )
    if partial is not None:
        launch(
            compiled,
            "combine_chunks",
            (ceil_div(c, common.FINISH_CHANNELS),),
            common.FINISH_BLOCK,
            partial,
            mean,
            inv_std,
            running,
            float(eps),
            num_rows,
            rows_of_a_chunk,
            num_chunks,
            c,
        )
    return ChannelStats(mean, inv_std)
