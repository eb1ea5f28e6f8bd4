"""The definition of every op, in plain PyTorch, for any floating dtype and any device."""

from locallearn.kernels.reference.augment import augment
from locallearn.kernels.reference.block_backward import block_backward, norm_backward
from locallearn.kernels.reference.block_forward import block_forward
from locallearn.kernels.reference.channel_stats import channel_stats
from locallearn.kernels.reference.local_head import local_head, project_latents
from locallearn.kernels.reference.schedulefree_step import schedulefree_step

__all__ = [
    "augment",
    "block_backward",
    "block_forward",
    "channel_stats",
    "local_head",
    "norm_backward",
    "project_latents",
    "schedulefree_step",
]
