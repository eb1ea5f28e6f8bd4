"""Peak memory of a call, counted from allocations and not guessed from the size of the process."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_memory_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest number of tensor bytes that a call holds beyond what was held before it.

    On the CPU from the allocator's own events, on CUDA from the caching allocator's counters.
    What a library allocates behind torch's back (oneDNN's and cuDNN's scratch space on the CPU) is
    not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Its library tells of every start and stop on standard error, unless it is asked not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Not torch.profiler.profile: PyTorch 2.11's warns unless it is told to prepare every event for
    # its tables, which takes longer than a step.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]"
    )
    assert events, "the profiler recorded no allocation"
    live = peak = 0
    for _, num_bytes in events:
        live += num_bytes
        peak = max(peak, live)
    return peak
