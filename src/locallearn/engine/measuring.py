"""Peak memory of a call, counted from allocations and not guessed from the size of the process."""

from __future__ import annotations

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
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    assert profile.profiler is not None
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    assert events, "the profiler recorded no allocation"
    live = peak = 0
    for _, num_bytes in events:
        live += num_bytes
        peak = max(peak, live)
    return peak
