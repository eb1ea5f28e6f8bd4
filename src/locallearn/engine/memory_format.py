"""Channels-last memory: the faster format for convolutions, of 4-d tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def to_channels_last(model: nn.Module) -> None:
    """4-d weights and buffers alone: ``model.to(memory_format=...)`` refuses 5-d ones."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def in_channels_last(images: Tensor) -> Tensor:
    if images.ndim != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last)
