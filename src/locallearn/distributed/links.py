"""Activations on their way from a stage to the next.

A message is a header, on the host, and the tensor's values, on the device. The receiver asks for
both before the sender has them, so that they travel while both compute:

    stage r      compute t      | send t | compute t+1   | send t+1 | ...
    stage r+1    compute t-1 (t arrives) | compute t     (t+1 arrives)

At most two messages of a link are under way: the one that is being sent, and the one that is being
made.

Shapes: N batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.distributed.processes import Processes

Waiting = Callable[[int], contextlib.AbstractContextManager[Any]]
"""Around the waiting for a rank, and around what else fails once that is lost."""

_HEADER_TAG, _VALUES_TAG = 1, 2
_MOST_DIMS = 8
# number, end of a sequence, flag, batch; type of the values, number of dimensions, sizes, strides
_HEADER_LENGTH = 4 + 2 + 2 * _MOST_DIMS
# What is sent.
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64)


@dataclass(frozen=True)
class _Format:
    """How values in the order of memory make a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Format:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride())

    def numbers(self) -> list[int]:
        rest = [0] * (_MOST_DIMS - len(self.shape))
        kind = DTYPES.index(self.dtype)
        return [kind, len(self.shape), *self.shape, *rest, *self.stride, *rest]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> _Format:
        kind, num_dims, *rest = numbers
        stride = rest[_MOST_DIMS : _MOST_DIMS + num_dims]
        return cls(DTYPES[kind], tuple(rest[:num_dims]), tuple(stride))

    def num_values(self, num_images: int | None = None) -> int:
        """Of this batch, or of one of so many images."""
        num, *of_image = self.shape
        return math.prod(of_image, start=num if num_images is None else num_images)


def _dense(tensor: Tensor) -> Tensor:
    """Detached, and without gaps between its values."""
    tensor = tensor.detach()
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _values(tensor: Tensor) -> Tensor:
    """Of a dense tensor, in the order of memory: (M,)."""
    return tensor.as_strided((tensor.numel(),), (1,))


class Outbox:
    """To the process that trains the next stage on the same images.

    Arguments:
        processes: all.
        receiver: its rank.
        waiting: around the waiting for it.

    Attributes:
        flag, batch: numbers that go along with what is put; the receiver finds them in its own.
    """

    def __init__(self, processes: Processes, receiver: int, waiting: Waiting) -> None:
        self.flag = 0
        self.batch = 0
        self._control = processes.control
        self._receiver = receiver
        self._waiting = waiting
        self._number = 0
        self._under_way: list[Any] = []  # works, and what they read

    def put(self, tensor: Tensor) -> None:
        """Send (N, ...), once what was sent before has arrived."""
        tensor = _dense(tensor)
        self._send_header(_Format.of(tensor))
        if tensor.numel():
            with self._waiting(self._receiver):
                work = dist.isend(_values(tensor), self._receiver, tag=_VALUES_TAG)
            self._under_way.append((work, tensor))

    def end(self) -> None:
        """Nothing more comes of this sequence."""
        self._send_header(_Format(torch.float32, (0,), (1,)), is_end=True)

    def flush(self) -> None:
        """Wait until all has arrived."""
        with self._waiting(self._receiver):
            for work, _ in self._under_way:
                work.wait()
        self._under_way.clear()

    def _send_header(self, format: _Format, *, is_end: bool = False) -> None:
        self.flush()
        self._number += 1
        header = torch.tensor([self._number, int(is_end), self.flag, self.batch, *format.numbers()])
        with self._waiting(self._receiver):
            work = dist.isend(header, self._receiver, group=self._control, tag=_HEADER_TAG)
        self._under_way.append((work, header))


def _unwatched(rank: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class _Expected:
    """A message that is asked for: its header, and its values where their format is known."""

    header: Tensor
    of_header: Any
    values: Tensor | None = None
    of_values: Any = None


class Inbox:
    """From the process that trains the stage before on the same images.

    Arguments:
        processes: all.
        sender: its rank; kept.
        waiting: around the waiting for it.
        device: where to.

    Attributes:
        flag, batch: of what was taken last, or of the end.
    """

    def __init__(
        self, processes: Processes, sender: int, waiting: Waiting, device: torch.device
    ) -> None:
        self.flag = 0
        self.batch = 0
        self._control = processes.control
        self._device = device
        self.sender = sender
        self._waiting = waiting
        self._number = 0
        self._expected: _Expected | None = None

    def take(self, following: int | None = None, *, is_watched: bool = True) -> Tensor | None:
        """The next message, (N, ...); None at the end of a sequence.

        Arguments:
            following: N of the one after it, which is like it and is asked for at once, unless
                this one is flagged; None where that is not known.
            is_watched: whether it is the main thread that waits.
        """
        waiting = self._waiting if is_watched else _unwatched
        expected = self._expected or self._ask(waiting)
        self._expected = None
        with waiting(self.sender):
            expected.of_header.wait()
        number, is_end, self.flag, self.batch, *numbers = expected.header.tolist()
        self._number += 1
        assert number == self._number, f"message {self._number} expected, {number} has come"
        if is_end:
            return None
        format = _Format.from_numbers(numbers)
        if expected.values is None:
            self._ask_values(expected, format.num_values(), format.dtype, waiting)
        values = expected.values
        assert values is not None
        assert (values.numel(), values.dtype) == (format.num_values(), format.dtype), (
            f"{values.numel()} values of {values.dtype} were expected, {format} has come"
        )
        if expected.of_values is not None:
            with waiting(self.sender):
                expected.of_values.wait()
        if following is not None and not self.flag:
            self._expected = self._ask(waiting)
            num = format.num_values(following)
            self._ask_values(self._expected, num, format.dtype, waiting)
        # The very strides, which say how a layer computes it.
        return values.as_strided(format.shape, format.stride)

    def sequence(self) -> Iterator[Tensor]:
        """All that comes until the sender ends it."""
        while (tensor := self.take()) is not None:
            yield tensor

    def _ask(self, waiting: Waiting) -> _Expected:
        header = torch.empty(_HEADER_LENGTH, dtype=torch.int64)
        with waiting(self.sender):
            work = dist.irecv(header, self.sender, group=self._control, tag=_HEADER_TAG)
        return _Expected(header, work)

    def _ask_values(
        self, expected: _Expected, num: int, dtype: torch.dtype, waiting: Waiting
    ) -> None:
        expected.values = torch.empty(num, dtype=dtype, device=self._device)
        if num:
            with waiting(self.sender):
                expected.of_values = dist.irecv(expected.values, self.sender, tag=_VALUES_TAG)
