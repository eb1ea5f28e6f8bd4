"""The ops as Triton kernels; signatures and definitions in `kernels.interface`.

Inputs are float32, bfloat16 or float16, in any memory layout; channels-last is the fast one.
Statistics, moments and sums are float32. Nothing is read on the host, no sum depends on the order
in which programs happen to run, and a step whose shapes stay can be captured in a CUDA graph.
Kernels run on the current device, which has to be that of the tensors.
"""

from locallearn.kernels.triton.augment import augment
from locallearn.kernels.triton.block_backward import block_backward, norm_backward
from locallearn.kernels.triton.block_forward import block_forward
from locallearn.kernels.triton.channel_stats import channel_stats
from locallearn.kernels.triton.local_head import local_head
from locallearn.kernels.triton.schedulefree_step import schedulefree_step

__all__ = [
    "augment",
    "block_backward",
    "block_forward",
    "channel_stats",
    "local_head",
    "norm_backward",
    "schedulefree_step",
]
