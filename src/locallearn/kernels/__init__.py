"""The hot operations of local learning. Tensors in, tensors out: no module, rule or device here.

Each op has one name and one signature (`interface.py`) and several backends. `reference` is the
definition, to which every other is held.
"""

from locallearn.kernels.backends import (
    BACKENDS,
    GPU_BACKENDS,
    choose_backend,
    cxx_compiler,
    fastest_candidates,
    load_kernels,
    missing_for,
)
from locallearn.kernels.interface import (
    BlockForward,
    ChannelStats,
    Crops,
    HeadResult,
    Kernels,
    Moments,
    NormGradient,
    PeriodicBasis,
    ScheduleFreeState,
)
from locallearn.kernels.latents import pool_latents, unpool_latents
from locallearn.kernels.reference.local_head import (
    label_similarity,
    match_similarity,
    moment_gradients,
    moment_latents,
    project_latents,
)

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "BlockForward",
    "ChannelStats",
    "Crops",
    "HeadResult",
    "Kernels",
    "Moments",
    "NormGradient",
    "PeriodicBasis",
    "ScheduleFreeState",
    "choose_backend",
    "cxx_compiler",
    "fastest_candidates",
    "label_similarity",
    "load_kernels",
    "match_similarity",
    "missing_for",
    "moment_gradients",
    "moment_latents",
    "pool_latents",
    "project_latents",
    "unpool_latents",
]
