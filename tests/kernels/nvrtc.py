"""Whether CUDA sources can be compiled here. A device or its driver is not needed."""

from __future__ import annotations

import functools


@functools.cache
def missing() -> str | None:
    """What this machine lacks, or None."""
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc
    except ImportError:
        return "the package cuda-core is not installed"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"NVRTC, which comes with PyTorch for CUDA, is not installed: {error}"
    return None
