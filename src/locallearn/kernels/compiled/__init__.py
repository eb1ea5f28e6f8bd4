"""Every op through torch.compile: the fast path of the CPU.

What is compiled is written for Inductor's C++ loops: on (N, H, W, C) views, which a channels-last
tensor is without a copy, and so that each loop reads its tensor once and writes it in order. The
large passes are compiled for one shape each, with the batch size left open, so that the smaller
last batch of an epoch compiles nothing; the small ones for any shape at once.
"""

from locallearn.kernels.compiled.augment import augment
from locallearn.kernels.compiled.block_backward import block_backward, norm_backward
from locallearn.kernels.compiled.block_forward import block_forward
from locallearn.kernels.compiled.channel_stats import channel_stats
from locallearn.kernels.compiled.local_head import local_head
from locallearn.kernels.compiled.schedulefree_step import schedulefree_step

__all__ = [
    "augment",
    "block_backward",
    "block_forward",
    "channel_stats",
    "local_head",
    "norm_backward",
    "schedulefree_step",
]
