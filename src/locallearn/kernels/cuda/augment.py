"""`augment`; see `kernels.interface`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from locallearn.kernels import interface
from locallearn.kernels.cuda.common import MAX_THREADS, empty, per_channel, program_of
from locallearn.kernels.cuda.launching import address, launch
from locallearn.kernels.device_layout import ceil_div, check_image_dtype


class _Crops(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in interface.Crops._fields)


@torch.no_grad()
def augment(
    crops: interface.Crops,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    check_image_dtype("cuda", dtype)
    batch_size, num_channels = len(crops.top), crops.pixels.shape[1]
    height, width = size
    images = empty(mean, batch_size, num_channels, height, width, dtype=dtype)
    crops = interface.Crops(*(t.contiguous() for t in crops))
    launch(
        program_of("augment.cu", dtype, 1),
        "augment",
        (batch_size, ceil_div(height * width, MAX_THREADS)),
        (MAX_THREADS,),
        _Crops(*map(address, crops)),
        *per_channel(mean, std),
        images,
        height,
        width,
        num_channels,
    )
    return images
