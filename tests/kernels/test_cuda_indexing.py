"""Which thread of a CUDA kernel takes what: every small size, against the reference in float64."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from tests.kernels import cuda_on_cpu
from tests.kernels.checks import (
    DEVICE,
    HEAD,
    arrange,
    block_inputs,
    check,
    head_inputs,
    randn,
    wide,
)
from torch import Tensor

from locallearn.kernels import reference
from locallearn.kernels.cuda import launching
from locallearn.kernels.cuda.common import program_of
from locallearn.kernels.cuda.compilation import Program, source_text
from locallearn.kernels.interface import HeadResult, ScheduleFreeState

SIDES = range(1, 8)
LATENT_SIZES = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16]
SLOPE = {"negative_slope": 0.1}


@pytest.fixture
def vectors(cuda_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The VECTOR of each launch."""
    found: list[int] = []
    run = launching.run

    def noted(program: Program, *arguments: object) -> None:
        found.append(int(dict(program.constants)["VECTOR"]))
        run(program, *arguments)

    monkeypatch.setattr(launching, "run", noted)
    return found


def misaligned(x: Tensor, num_elements: int) -> Tensor:
    """A channels-last copy that begins so many elements behind a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + num_elements, dtype=x.dtype, device=x.device)[num_elements:]
    if x.ndim == 4:
        n, c, h, w = x.shape
        return memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    return memory.view(x.shape).copy_(x)


def joined(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of many sizes, one behind another.

    One of a few values may nearly cancel by chance, and is then not held to itself alone.
    """
    return [torch.cat([t.flatten() for t in same]) for same in zip(*results, strict=True)]


SPANS = """
extern "C" __global__ void spans(int* found, int size, int num_cells) {
  const auto note = [&](const Span& span) { *found++ = span.begin, *found++ = span.end; };
  for (int i = 0; i < num_cells; ++i) note(cell_of(i, size, num_cells));
  for (int i = 0; i < num_cells; ++i) note(own_part_of(i, size, num_cells));
  for (int i = 0; i < size; ++i) note(cells_that_hold(i, size, num_cells));
}
"""


def test_cells_their_own_parts_and_who_holds_a_position(
    emulated_device: cuda_on_cpu.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = source_text("common.cuh", without="half.cuh") + SPANS
    monkeypatch.setattr(cuda_on_cpu, "source_text", lambda name, without: text)
    program = program_of("spans", torch.float32, 1)
    for size, num_cells in itertools.product(range(1, 34), repeat=2):
        found = torch.full((2 * num_cells + size, 2), -1, dtype=torch.int32)
        arguments = [ctypes.c_void_p(found.data_ptr()), *map(ctypes.c_int, (size, num_cells))]
        emulated_device.run(program, "spans", (1,), (1,), arguments, 0)
        spans = [range(*span) for span in found.tolist()]
        cells, own, holding = spans[:num_cells], spans[num_cells:-size], spans[-size:]
        # As adaptive pooling has them.
        assert cells == [
            range(i * size // num_cells, -(-(i + 1) * size // num_cells)) for i in range(num_cells)
        ]
        for i, part in enumerate(own):
            later = set().union(*cells[i + 1 :])
            assert set(part) == set(cells[i]) - later
        assert list(itertools.chain.from_iterable(own)) == list(range(size))
        assert holding == [
            range(min(held), max(held) + 1)
            for position in range(size)
            if (held := [i for i, cell in enumerate(cells) if position in cell])
        ]


@pytest.mark.parametrize("max_pool", [1, 2, 3])
@pytest.mark.parametrize("size", LATENT_SIZES)
def test_block_forward_at_every_size(cuda_kernels: ModuleType, size: int, max_pool: int) -> None:
    for height, width in itertools.product(SIDES, SIDES):
        inputs = block_inputs((2, 1, height, width), torch.float32, "channels_last")
        options = SLOPE | {"latent_size": size, "max_pool": max_pool}
        output, moments = cuda_kernels.block_forward(*inputs, **options)
        bare = cuda_kernels.block_forward(*inputs, **options | {"latent_size": None})
        assert bare.moments is None
        assert torch.equal(bare.output, output)
        if max_pool > min(height, width):  # which max_pool2d refuses
            assert output.shape == (2, 1, height // max_pool, width // max_pool)
            options["max_pool"] = 1
            output = None
        low = reference.block_forward(*inputs, **options)
        exact = reference.block_forward(*wide(inputs), **options)
        where = f"of {height} x {width}"
        check(moments, low.moments, exact.moments, [f"s0 {where}", f"s1 {where}"])
        if output is not None:
            check([output], [low.output], [exact.output], [f"output {where}"])


@pytest.mark.parametrize("size", [*LATENT_SIZES, 5])
def test_block_backward_at_every_size(cuda_kernels: ModuleType, size: int) -> None:
    for height, width in itertools.product(SIDES, SIDES):
        z, *others = block_inputs((2, 1, height, width), torch.float32, "channels_last")
        inputs = (arrange(randn(2, 1, size, size), "channels_last"), *others, randn(1), randn(1))
        exact = reference.block_backward(z.double(), *map(wide, inputs), **SLOPE)
        low = reference.block_backward(z.clone(), *inputs, **SLOPE)
        result = cuda_kernels.block_backward(z, *inputs, **SLOPE)
        check([result], [low], [exact], [f"grad_z of {height} x {width}"])


def expected_vector(num_channels: int, dtype: torch.dtype, offset: int = 0) -> int:
    vector = 16 // dtype.itemsize
    while num_channels % vector or offset % vector:
        vector //= 2
    return vector


# Offsets: in elements, of where the large tensor begins.
@pytest.mark.parametrize(("most_channels", "offset"), [(17, 0), (16, 1), (16, 2), (16, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_channels(
    cuda_kernels: ModuleType,
    vectors: list[int],
    dtype: torch.dtype,
    most_channels: int,
    offset: int,
) -> None:
    for num_channels in range(1, most_channels + 1) if not offset else (8, most_channels):
        aligned, *others = block_inputs((2, num_channels, 5, 4), dtype, "channels_last")
        gradients = randn(2, num_channels, 2, 2), *others, randn(num_channels), randn(num_channels)
        grad_output = randn(2, num_channels, 5, 4).to(dtype)
        vectors.clear()

        def results(
            ops: ModuleType,
            x: Tensor,
            gradients: tuple[object, ...],
            grad_output: Tensor,
            make: Callable[[Tensor], Tensor] = torch.clone,
        ) -> list[Tensor]:
            given = gradients[1:4]
            output, moments = ops.block_forward(make(x), *given, **SLOPE, latent_size=2)
            return [
                *ops.channel_stats(make(x), eps=1e-5),
                output,
                *moments,
                ops.block_backward(make(x), *gradients, **SLOPE),
                *ops.norm_backward(make(x), make(grad_output), *given, **SLOPE),
            ]

        ours = results(
            cuda_kernels, aligned, gradients, grad_output, lambda x: misaligned(x, offset)
        )
        assert set(vectors) == {expected_vector(num_channels, dtype, offset)}
        low = results(reference, aligned, gradients, grad_output)
        exact = results(reference, *map(wide, (aligned, gradients, grad_output)))
        names = ["mean", "inv_std", "output", "s0", "s1", "grad_z", "norm's grad_z", "", ""]
        check(ours, low, exact, [f"{name}, {num_channels} channels" for name in names])


@pytest.mark.parametrize(("most_chunks", "rows_of_a_thread"), [(512, 8), (3, 1)])
@pytest.mark.parametrize("num_channels", [3, 16, 33])
def test_every_number_of_rows(
    cuda_kernels: ModuleType,
    num_channels: int,
    most_chunks: int,
    rows_of_a_thread: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = importlib.import_module("locallearn.kernels.cuda.common")
    monkeypatch.setattr(common, "MAX_CHUNKS", most_chunks)
    monkeypatch.setattr(common, "_ROWS_OF_A_THREAD", rows_of_a_thread)
    results: tuple[list[list[Tensor]], ...] = ([], [], [])
    for num_rows in (*range(1, 71), 128, 129, 300):
        z, *others = block_inputs((num_rows, num_channels), torch.float32, "contiguous")
        grad = randn(num_rows, num_channels)
        for found, ops, x, g, given in zip(
            results,
            (cuda_kernels, reference, reference),
            (z, z, z.double()),
            (grad, grad, grad.double()),
            (others, others, map(wide, others)),
            strict=True,
        ):
            stats = ops.channel_stats(x, eps=1e-2)
            found.append([*stats, *ops.norm_backward(x.clone(), g, *given, **SLOPE)])
    names = ["mean", "inv_std", "grad_z", "grad_gamma", "grad_beta"]
    check(*map(joined, results), names)


@pytest.mark.parametrize("num_classes", [3, 66])
def test_every_pooling_of_features(cuda_kernels: ModuleType, num_classes: int) -> None:
    for num_features in range(1, 13):
        results: tuple[list[HeadResult], ...] = ([], [], [])
        for length in range(1, 13):
            moments, gamma, beta, labels = head_inputs((2, num_features), num_classes)
            inputs = moments, gamma, beta, randn(num_classes, length)
            # Of equal values, normalised, the gradient is zero but for rounding.
            normalize = min(num_features, length) > 1
            options = {"temperature": 0.5, "normalize": normalize, "needs_grad_projection": True}
            for found, ops, given in zip(
                results,
                (cuda_kernels, reference, reference),
                (inputs, inputs, tuple(map(wide, inputs))),
                strict=True,
            ):
                found.append(ops.local_head(*given, labels, **options))
        check(*map(joined, results), [f"{name} of {num_features} features" for name in HEAD])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 2), (2, 6, 3, 3), (3, 8, 2, 4), (2, 33, 4, 4)], ids=str
)
@pytest.mark.parametrize("num_classes", [1, 5, 64, 65])
def test_heads_of_many_widths(
    cuda_kernels: ModuleType, shape: tuple[int, ...], num_classes: int
) -> None:
    moments, gamma, beta, labels = head_inputs(shape, num_classes)
    length = shape[1] * shape[2] * shape[3]
    inputs = moments, gamma, beta, randn(num_classes, length)
    options = {"normalize": length > 1, "temperature": 0.5, "needs_grad_projection": True}
    results = [
        ops.local_head(*given, labels, **options)
        for ops, given in [
            (cuda_kernels, inputs),
            (reference, inputs),
            (reference, tuple(map(wide, inputs))),
        ]
    ]
    check(*results, HEAD)


def step(
    ops: ModuleType, starts: list[list[Tensor]], dtype: torch.dtype, offset: int
) -> list[Tensor]:
    """y, z and v after one step."""
    y, gradients, z, v = ([misaligned(t.to(dtype), offset) for t in part] for part in starts)
    numbers = torch.tensor([4.0, 0.3, 0.1, 0.05], dtype=torch.float64, device=DEVICE)
    state = ScheduleFreeState(*(t.clone() for t in numbers))
    options = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    ops.schedulefree_step(y, gradients, z, v, state, **options)
    assert all(map(torch.equal, gradients, (g.to(dtype) for g in starts[1])))
    return [*y, *z, *v]


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "counts",
    [
        range(1, 41),
        [0, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 0],
        [1, 1025, *[3] * 46],
        [1, 1025, *[3] * 47],
        [*[5] * 96, 1030],
    ],
    ids=["1 to 40", "around a block's", "as many as a launch takes", "one more", "three launches"],
)
def test_every_number_of_parameters(
    cuda_kernels: ModuleType, vectors: list[int], counts: range | list[int], offset: int
) -> None:
    starts = [[randn(count) for count in counts] for _ in range(4)]
    starts[3] = [v.abs() for v in starts[3]]
    ours = step(cuda_kernels, starts, torch.float32, offset)
    num_launches = -(-sum(map(bool, counts)) // 48)
    assert vectors == [4, *[expected_vector(4, torch.float32, offset)] * num_launches]
    low = step(reference, starts, torch.float32, 0)
    exact = step(reference, starts, torch.float64, 0)
    names = [f"{name} of {count}" for name in ("y", "z", "v") for count in counts]
    check(ours, low, exact, names)
