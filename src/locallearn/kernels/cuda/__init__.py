"""The ops as CUDA C++ kernels; signatures and definitions in `kernels.interface`.

Inputs are float32, bfloat16 or float16, in channels-last memory: what lies otherwise is copied so
first, and back where an op writes over it. Statistics, moments and sums are float32. Nothing is
read on the host, no sum depends on the order in which blocks happen to run, and a step whose shapes
stay can be captured in a CUDA graph. Kernels run on the current device, which has to be that of the
tensors, and are compiled when they are first launched there: by NVRTC, which comes with PyTorch, so
that no compiler need be installed. docs/kernels.md has what each reads and writes.
"""

from locallearn.kernels.cuda.augment import augment
from locallearn.kernels.cuda.block_backward import block_backward
from locallearn.kernels.cuda.block_forward import block_forward
from locallearn.kernels.cuda.channel_stats import channel_stats
from locallearn.kernels.cuda.local_head import local_head
from locallearn.kernels.cuda.norm_backward import norm_backward
from locallearn.kernels.cuda.schedulefree_step import schedulefree_step

__all__ = [
    "augment",
    "block_backward",
    "block_forward",
    "channel_stats",
    "local_head",
    "norm_backward",
    "schedulefree_step",
]
