"""What the launchers share: how tensors lie, how wide accesses are, how threads are shared out.

Shapes: N images, C channels, H W height and width, in channels-last memory. An (N, F) tensor is one
of N images of one position with F channels. A row is one position of one image.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from locallearn.kernels.cuda.compilation import Program, program
from locallearn.kernels.device_layout import ceil_div, power_of_two

MAX_THREADS = 256  # of a block
# What a thread loads before it uses the first; see kBatch in common.cuh.
BATCH = 4
WARP = 32
_ACCESS_BYTES = 16
# Neighbours that access 16 bytes each then make up a line of memory, of 128.
_COLUMNS_OF_A_LINE = 8

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Sizes(NamedTuple):
    """N, C, H and W."""

    num_images: int
    num_channels: int
    height: int
    width: int

    @property
    def num_rows(self) -> int:
        return self.num_images * self.height * self.width


class Threads(NamedTuple):
    """A block, and how many make up the channels."""

    num_columns: int
    num_slots: int
    num_blocks: int

    @property
    def block(self) -> tuple[int, int]:
        return self.num_columns, self.num_slots

    def filled(self) -> Threads:
        """With as many slots as a block holds."""
        return self._replace(num_slots=MAX_THREADS // self.num_columns)


class Chunks(NamedTuple):
    """How rows are shared out to blocks that each leave a partial sum."""

    threads: Threads
    rows_of_a_chunk: int
    num_chunks: int


# Few enough that the threads of one block add up what they leave, many enough that all
# multiprocessors of a large device have some to read.
MAX_CHUNKS = 256
# Of the block that adds up, a thread for each of so many channels.
FINISH_CHANNELS = 8
FINISH_BLOCK = (FINISH_CHANNELS, MAX_THREADS // FINISH_CHANNELS)
# So many rows are worth a thread.
_ROWS_OF_A_THREAD = BATCH
# Enough blocks for all multiprocessors of a large device.
_MANY_BLOCKS = 256


def program_of(
    source: str, dtype: torch.dtype, vector: int, *, batch: int = BATCH, **constants: object
) -> Program:
    """What a launch compiles: a file, and what common.cuh and itself say that a launch defines."""
    return program(
        source,
        ELEMENT=_NAMES[dtype],
        VECTOR=vector,
        MAX_THREADS=MAX_THREADS,
        BATCH=batch,
        **constants,
    )


def sizes(t: Tensor) -> Sizes:
    n, c, *positions = t.shape
    height, width = positions or (1, 1)
    assert c * height * width < 2**31  # within an image kernels count in 32 bits
    return Sizes(n, c, height, width)


def channels_last(t: Tensor) -> Tensor:
    """t itself, or a copy that lies channels-last."""
    if t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.contiguous()


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the same device; channels-last where it has four dimensions."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def per_channel(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.float32).contiguous() for t in tensors]


def vector_of(num_channels: int, *tensors: Tensor) -> int:
    """How many of the first tensor's elements a thread takes at a time: 16 bytes, or less where the
    channels or the tensors' addresses are no multiple of that."""
    vector = _ACCESS_BYTES // tensors[0].element_size()
    while vector > 1 and not (
        num_channels % vector == 0
        and all(_is_aligned(t, vector * t.element_size()) for t in tensors)
    ):
        vector //= 2
    return vector


def _is_aligned(t: Tensor, num_bytes: int) -> bool:
    return t.data_ptr() % min(num_bytes, _ACCESS_BYTES) == 0


@functools.cache
def threads_for(num_channels: int, vector: int, num_slots: int) -> Threads:
    """Columns for the channels beside so many slots, a power of two; more slots where a warp would
    not be full."""
    num_vectors = num_channels // vector
    num_columns = min(power_of_two(num_vectors), MAX_THREADS // num_slots)
    # A row that is no power of two leaves the last block's threads idle: narrower ones, fewer.
    narrower = num_columns // 2
    while narrower >= _COLUMNS_OF_A_LINE:
        if _rounded(num_vectors, narrower) < _rounded(num_vectors, num_columns):
            num_columns = narrower
        narrower //= 2
    num_slots = max(num_slots, WARP // num_columns)
    return Threads(num_columns, num_slots, ceil_div(num_vectors, num_columns))


def _rounded(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def slots_for(num_positions: int, positions_of_a_thread: int) -> int:
    most = MAX_THREADS // _COLUMNS_OF_A_LINE
    return min(power_of_two(ceil_div(num_positions, positions_of_a_thread)), most)


def batch_for(num_positions: int, num_slots: int, most: int = BATCH) -> int:
    """How many positions a thread loads at a time: no more than it has."""
    return min(most, power_of_two(max(1, ceil_div(num_positions, num_slots))))


def chunks_for(num_rows: int, num_channels: int, vector: int) -> Chunks:
    """A batch of rows for each thread at least. As many columns as leave many blocks: blocks beside
    each other then read what lies beside each other."""
    assert num_rows > 0
    num_columns = WARP
    while True:
        threads = threads_for(num_channels, vector, MAX_THREADS // num_columns).filled()
        least = threads.num_slots * _ROWS_OF_A_THREAD
        rows = max(least, _rounded(ceil_div(num_rows, MAX_CHUNKS), threads.num_slots))
        chunks = Chunks(threads, rows, ceil_div(num_rows, rows))
        is_many = chunks.num_chunks * threads.num_blocks >= _MANY_BLOCKS
        if is_many or num_columns == _COLUMNS_OF_A_LINE:
            return chunks
        num_columns //= 2
