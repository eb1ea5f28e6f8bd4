"""The hot operations of local learning. Tensors in, tensors out: no module, rule or device here.

Each op has one name and one signature; what stands here is its `reference` form (plain PyTorch,
any floating dtype, the definition), to which every faster backend is held.
"""

from locallearn.kernels.latents import pool_latents, unpool_latents
from locallearn.kernels.local_head import LocalHeadResult, local_head

__all__ = ["LocalHeadResult", "local_head", "pool_latents", "unpool_latents"]
