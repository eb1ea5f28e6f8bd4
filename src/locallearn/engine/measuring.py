"""Memory of a call, counted from allocations and not guessed from the size of the process."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

Mark = Callable[[str], None]

_MARK = "locallearn: "  # how the name of a mark begins among the profiler's events


@dataclass(frozen=True)
class Timeline:
    """What a call held at each moment.

    Attributes:
        segments: label and values, in the order of time: the tensor bytes held beyond what was
            held before the call, on the CPU after each allocation and each release, on CUDA the
            highest alone.
    """

    segments: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def peak_bytes(self) -> int:
        """The highest of all values."""
        return max(max(values) for _, values in self.segments)

    def extended(self, other: Timeline, step: float) -> Timeline:
        """The line through two timelines, taken ``step`` times from this one to the other.

        Of calls that allocate the same tensors in the same order, each as large as the batch or
        of a size of its own, this is what a call on another batch holds at each moment: not the
        highest value is extended, which may be reached somewhere else then, but every one.
        Segments of which the two have not the same number of values are extended by their
        highest.

        Raises:
            ValueError: the two have other segments.
        """
        labels = [label for label, _ in self.segments]
        if labels != [label for label, _ in other.segments]:
            raise ValueError("the two calls did not do the same")
        segments = []
        for (label, ours), (_, theirs) in zip(self.segments, other.segments, strict=True):
            if len(ours) != len(theirs):
                ours, theirs = (max(ours),), (max(theirs),)
            values = (math.ceil(a + step * (b - a)) for a, b in zip(ours, theirs, strict=True))
            segments.append((label, tuple(values)))
        return Timeline(tuple(segments))


def memory_timeline(call: Callable[[Mark], object], device: torch.device | str = "cpu") -> Timeline:
    """What a call holds beyond what was held before it, at each moment.

    On the CPU from the allocator's own events, on CUDA from the caching allocator's counters.
    What a library allocates behind torch's back (oneDNN's and cuDNN's scratch space on the CPU) is
    not seen.

    Arguments:
        call: is given a function that ends a segment and names the one that begins; the first is
            named "".
        device: where the tensors are.
    """
    device = torch.device(device)
    gc.collect()  # what is freed meanwhile is to be the call's own
    if device.type == "cuda":
        return _on_cuda(call, device)
    # The profiler tells of itself on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Not torch.profiler.profile: PyTorch 2.11's warns unless it is told to prepare every event for
    # its tables, which takes longer than a step.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call(mark)
    assert profile.kineto_results is not None
    events = sorted(
        (event.start_ns(), event.nbytes(), event.name())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith(_MARK)
    )
    live, values = 0, [0]
    segments: list[tuple[str, tuple[int, ...]]] = []
    label = ""
    for _, num_bytes, name in events:
        if name == "[memory]":
            live += num_bytes
            values.append(live)
        else:
            segments.append((label, tuple(values)))
            label, values = name.removeprefix(_MARK), [live]
    segments.append((label, tuple(values)))
    assert any(len(values) > 1 for _, values in segments), "the profiler recorded no allocation"
    return Timeline(tuple(segments))


def mark(label: str) -> None:
    """End a segment of the timeline that is being taken on the CPU, if one is; begin another."""
    with torch.autograd.profiler.record_function(_MARK + label):
        pass


def _on_cuda(call: Callable[[Mark], object], device: torch.device) -> Timeline:
    segments: list[tuple[str, tuple[int, ...]]] = []
    label = ""

    def end_segment(following: str) -> None:
        nonlocal label
        torch.cuda.synchronize(device)
        segments.append((label, (torch.cuda.max_memory_allocated(device) - before,)))
        torch.cuda.reset_peak_memory_stats(device)
        label = following

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(end_segment)
    end_segment("")
    return Timeline(tuple(segments))


def peak_memory_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest number of tensor bytes that a call holds beyond what was held before it.

    Counted as :func:`memory_timeline` does.
    """
    return memory_timeline(lambda mark: call(), device).peak_bytes
