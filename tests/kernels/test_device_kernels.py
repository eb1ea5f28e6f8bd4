"""The kernels of the device backends against the reference in float64.

Where no GPU is, Triton's run in its interpreter and CUDA's sources as C++; what they compile to is
looked at in test_triton_compiled.py and test_cuda_compiled.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from schedulefree import AdamWScheduleFree
from tests.kernels.checks import (
    DEVICE,
    HEAD,
    SHAPES,
    Trajectory,
    arrange,
    block_inputs,
    check,
    gradients_of,
    head_inputs,
    official_basis,
    paper_basis,
    randn,
    starts,
    wide,
)
from torch import Tensor

from locallearn.errors import UserError
from locallearn.kernels import reference
from locallearn.kernels.interface import Crops, Moments, PeriodicBasis
from locallearn.kernels.periodic_basis import periodic_basis


def backend_of(kernels: ModuleType) -> str:
    return kernels.__name__.rpartition(".")[2]


def module_of(kernels: ModuleType, name: str) -> ModuleType:
    """The package's own name for it may be the op's."""
    return importlib.import_module(f"{kernels.__name__}.{name}")


def make_chunks(kernels: ModuleType, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share few rows out to chunks, each of several tiles or of several rows for a thread."""
    common = module_of(kernels, "common")
    monkeypatch.setattr(common, "MAX_CHUNKS", most)
    if backend_of(kernels) == "cuda":
        monkeypatch.setattr(common, "_ROWS_OF_A_THREAD", 1)


def made_basis(kernels: ModuleType, basis: PeriodicBasis) -> Tensor:
    """What the kernels make of it, (K, T)."""
    head = module_of(kernels, "local_head")
    return (head.periodic_basis if backend_of(kernels) == "cuda" else head._periodic_basis)(basis)


# shape, latent size, max-pool, and why the row is there
BLOCKS = [
    ((2, 3, 8, 8), 4, 1, "equal cells"),
    ((2, 5, 8, 8), 2, 2, "cells of whole windows: one pass"),
    ((2, 3, 8, 4), 2, 1, "cells that are not square"),
    ((2, 3, 7, 7), 2, 1, "overlapping cells"),
    ((2, 3, 7, 7), 2, 2, "overlapping cells, and a row and a column over"),
    ((2, 3, 6, 6), 2, 2, "windows that lie in two cells"),
    ((2, 3, 5, 9), 3, 1, "overlapping on one side, not on the other"),
    ((2, 3, 1, 1), 2, 1, "fewer positions than cells"),
    ((2, 3, 2, 3), 5, 1, "fewer positions than cells, which overlap"),
    ((1, 1, 1, 1), 1, 1, "the smallest"),
    ((2, 3, 9, 8), 1, 3, "columns over, one cell"),
    ((1, 3, 2, 2), 1, 3, "a window larger than the image: no output"),
    ((1, 130, 4, 4), 2, 1, "more channels than a program takes"),
    ((1, 40, 18, 20), 1, 2, "a cell of several tiles, the last one not full"),
    ((3, 12), 4, 1, "linear"),
    ((1, 1), 1, 1, "linear, the smallest"),
]
# A value is converted when it is loaded or stored, wherever it lies: bf16 in one layout.
INPUTS = pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("channels_last", torch.float32),
        ("strided", torch.float32),
        ("channels_last", torch.bfloat16),
    ],
    ids=["contiguous-fp32", "channels_last-fp32", "strided-fp32", "channels_last-bf16"],
)
BLOCK_IDS = [c[3] for c in BLOCKS]


@INPUTS
@pytest.mark.parametrize(("shape", "size", "max_pool", "why"), BLOCKS, ids=BLOCK_IDS)
def test_block_forward(
    kernels: ModuleType,
    shape: tuple[int, ...],
    size: int,
    max_pool: int,
    why: str,
    layout: str,
    dtype: torch.dtype,
) -> None:
    inputs = block_inputs(shape, dtype, layout)
    before = inputs[0].clone()
    wide_inputs = wide(inputs)
    for latent_size in (size, None):
        options = {"negative_slope": 0.1, "latent_size": latent_size, "max_pool": max_pool}
        if shape[-1] < max_pool:  # which max_pool2d refuses
            result = kernels.block_forward(*inputs, **options)
            assert result.output.shape == (1, 3, 0, 0)
            options["max_pool"] = 1
        result = kernels.block_forward(*inputs, **options)
        low = reference.block_forward(*inputs, **options)
        exact = reference.block_forward(*wide_inputs, **options)
        check([result.output], [low.output], [exact.output], ["output"])
        if latent_size is None:
            assert result.moments is None
        else:
            check(result.moments, low.moments, exact.moments, ["s0", "s1"])
        if layout == "channels_last" and len(shape) == 4:
            assert result.output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(inputs[0], before)


@pytest.mark.parametrize("slope", [0, 0.0, 1, 1.5])
def test_other_slopes(kernels: ModuleType, slope: float) -> None:
    inputs = block_inputs((2, 3, 6, 6), torch.float16, "channels_last")
    options = {"negative_slope": slope, "latent_size": 3, "max_pool": 2}
    result = kernels.block_forward(*inputs, **options)
    low = reference.block_forward(*inputs, **options)
    exact = reference.block_forward(*wide(inputs), **options)
    check(
        [result.output, *result.moments],
        [low.output, *low.moments],
        [exact.output, *exact.moments],
        ["output", "s0", "s1"],
    )


def test_max_pool_keeps_nan(kernels: ModuleType) -> None:
    z, *others = block_inputs((1, 2, 4, 4), torch.float32, "channels_last")
    z[0, 1, 3, 2] = math.nan
    options = {"negative_slope": 0.1, "latent_size": 2, "max_pool": 2}
    output = kernels.block_forward(z, *others, **options).output
    assert output.isnan().nonzero().tolist() == [[0, 1, 1, 1]]


@INPUTS
@pytest.mark.parametrize(("shape", "size", "max_pool", "why"), BLOCKS, ids=BLOCK_IDS)
def test_block_backward(
    kernels: ModuleType,
    shape: tuple[int, ...],
    size: int,
    max_pool: int,
    why: str,
    layout: str,
    dtype: torch.dtype,
) -> None:
    z, *others = block_inputs(shape, dtype, layout)
    c = shape[1]
    latents = arrange(randn(*shape[:2], *[size, size][: len(shape) - 2]), layout)
    inputs = (latents, *others, randn(c), randn(c))
    exact = reference.block_backward(z.double(), *(wide(i) for i in inputs), negative_slope=0.1)
    low = reference.block_backward(z.clone(), *inputs, negative_slope=0.1)
    result = kernels.block_backward(z, *inputs, negative_slope=0.1)
    assert result is z
    check([result], [low], [exact], ["grad_z"])


@INPUTS
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 6), (1, 1, 1, 1), (1, 130, 4, 4), (40, 3, 5, 5), (3, 7)]
)
def test_norm_backward(
    kernels: ModuleType,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_chunks(kernels, 3, monkeypatch)
    z, *others = block_inputs(shape, dtype, layout)
    gradients = [randn(*shape).to(dtype)]
    if layout == "channels_last":  # both as they should be, and one as it should not
        gradients.append(arrange(gradients[0], layout))
    for grad in gradients:
        exact = reference.norm_backward(
            z.double(), grad.double(), *(wide(o) for o in others), negative_slope=0.1
        )
        low = reference.norm_backward(z.clone(), grad, *others, negative_slope=0.1)
        mine = arrange(z, layout)
        result = kernels.norm_backward(mine, grad, *others, negative_slope=0.1)
        assert result.grad_z is mine
        check(result, low, exact, ["grad_z", "grad_gamma", "grad_beta"])


@INPUTS
@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((2, 3, 5, 6), "odd sizes"),
        ((2, 1, 1, 1), "two values"),
        ((1, 130, 4, 4), "more channels than a program takes"),
        ((7, 65, 9, 11), "several chunks of several tiles, the last of them not full"),
        ((40, 7), "linear"),
    ],
)
def test_channel_stats(
    kernels: ModuleType,
    shape: tuple[int, ...],
    why: str,
    layout: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_chunks(kernels, 5, monkeypatch)
    z = arrange((3 * randn(*shape) + 1).to(dtype), layout)
    running = [randn(shape[1]), randn(shape[1]).abs()]
    results = []
    for op, values, kept in [
        (kernels, z, [t.clone() for t in running]),
        (reference, z, [t.clone() for t in running]),
        (reference, z.double(), [t.double() for t in running]),
    ]:
        stats = op.channel_stats(values, *kept, eps=1e-5, momentum=0.3)
        results.append([*stats, *kept])
    check(*results, ["mean", "inv_std", "running_mean", "running_var"])
    bare = kernels.channel_stats(z, eps=1e-5)
    assert torch.equal(bare.mean, results[0][0])
    assert torch.equal(bare.inv_std, results[0][1])


def test_channel_stats_far_from_zero(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chunks(kernels, 5, monkeypatch)
    z = 1e4 + randn(4, 3, 40, 40)
    z[:, 1] += torch.linspace(0, 50, 40, device=DEVICE)  # a mean that moves
    z[:, 2] = 1e4  # no variance
    results = [
        reference.channel_stats(values, eps=1e-3) for values in (z.float(), z.float().double())
    ]
    check(kernels.channel_stats(z, eps=1e-3), *results, ["mean", "inv_std"])


# shape of the moments, classes, latent length, and why the row is there
HEADS = [
    ((4, 5, 2, 2), 3, 20, "odd sizes"),
    ((1, 1, 1, 1), 1, 1, "the smallest: one class"),
    ((3, 40, 4, 4), 10, 640, "latents of several tiles"),
    ((3, 9, 2, 2), 70, 36, "more classes than one program takes"),
    ((2, 4, 1, 1), 1000, 4, "a thousand classes"),
    ((19, 2), 5, 2, "linear, a batch of several tiles"),
    ((3, 12), 4, 4, "linear, equal windows"),
    ((3, 10), 4, 4, "linear, overlapping windows"),
    ((3, 6), 3, 16, "linear, latent longer than the features"),
    ((3, 10), 66, 4, "linear, overlapping windows, many classes"),
]


def compare_heads(
    kernels: ModuleType,
    moments: Moments,
    gamma: Tensor,
    beta: Tensor,
    projection: Tensor | PeriodicBasis,
    labels: Tensor,
    **options: object,
) -> None:
    inputs = (moments, gamma, beta, projection)
    exact = reference.local_head(*(wide(i) for i in inputs), labels, **options)
    low = reference.local_head(*inputs, labels, **options)
    result = kernels.local_head(*inputs, labels, **options)
    check(result, low, exact, HEAD)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shape", "num_classes", "length", "why"), HEADS)
def test_local_head(
    kernels: ModuleType,
    shape: tuple[int, ...],
    num_classes: int,
    length: int,
    why: str,
    normalize: bool,
    label_smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend_of(kernels) == "triton":
        monkeypatch.setattr(module_of(kernels, "local_head"), "_SUM_ROWS", 8)
        monkeypatch.setattr(module_of(kernels, "local_head"), "_SUM_SAMPLES", 4)
    moments, gamma, beta, labels = head_inputs(shape, num_classes)
    projection = randn(length, num_classes).T  # LLS-MxM's comes transposed
    for needs_grad_projection in (False, True):
        compare_heads(
            kernels,
            moments,
            gamma,
            beta,
            projection,
            labels,
            normalize=normalize,
            temperature=0.5,
            label_smoothing=label_smoothing,
            needs_grad_projection=needs_grad_projection,
        )


@pytest.mark.parametrize("is_square", [True, False])
@pytest.mark.parametrize("make", [official_basis, paper_basis])
def test_periodic_basis(
    kernels: ModuleType, make: Callable[..., PeriodicBasis], is_square: bool
) -> None:
    for num_classes, length in [(10, 2048), (3, 16), (1, 1), (5, 30)]:
        basis = make(num_classes, length, is_square=is_square)
        exact = periodic_basis(basis)
        actual = made_basis(kernels, basis)
        if is_square:
            assert torch.equal(actual.double(), exact)
        else:
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1.5e-7)
            assert torch.equal(actual == 0, exact == 0)


def test_negative_phases_and_many_turns(kernels: ModuleType) -> None:
    turns = torch.tensor([-3.25, 1e6 + 0.125, -0.5], dtype=torch.float64, device=DEVICE)
    basis = PeriodicBasis(turns, -turns, 50, False)
    actual = made_basis(kernels, basis)
    torch.testing.assert_close(actual.double(), periodic_basis(basis), rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("is_square", [True, False])
@pytest.mark.parametrize("num_classes", [3, 65])
@pytest.mark.parametrize(("shape", "length"), [((3, 5, 4, 4), 80), ((3, 12), 12), ((3, 10), 4)])
def test_local_head_makes_its_basis(
    kernels: ModuleType, shape: tuple[int, ...], length: int, num_classes: int, is_square: bool
) -> None:
    moments, gamma, beta, labels = head_inputs(shape, num_classes)
    basis = official_basis(num_classes, length, is_square=is_square)
    compare_heads(kernels, moments, gamma, beta, basis, labels, normalize=True, temperature=0.5)


@pytest.mark.parametrize("num_classes", [3, 65])
def test_a_latent_of_zeros_has_no_gradient(kernels: ModuleType, num_classes: int) -> None:
    moments, gamma, beta, labels = head_inputs((3, 5, 2, 2), num_classes)
    for m in moments:
        m[1] = 0
    projection = randn(num_classes, 20)
    result = kernels.local_head(
        moments, gamma, beta, projection, labels, normalize=True, temperature=0.5
    )
    assert (result.grad_latents[1] == 0).all()
    assert (result.grad_latents[0] != 0).any()
    assert all(t.isfinite().all() for t in result[:6])


@pytest.mark.parametrize(("shape", "num_classes", "length", "why"), HEADS)
def test_local_head_with_similarity(
    kernels: ModuleType, shape: tuple[int, ...], num_classes: int, length: int, why: str
) -> None:
    moments, gamma, beta, labels = head_inputs(shape, num_classes)
    projection = randn(num_classes, length)
    options = {"normalize": True, "temperature": 0.5, "similarity": 10.0}
    compare_heads(
        kernels, moments, gamma, beta, projection, labels, **options, needs_grad_projection=True
    )


def test_local_head_records_no_graph(kernels: ModuleType) -> None:
    moments, gamma, beta, labels = head_inputs((3, 5, 2, 2), 65)
    result = kernels.local_head(
        moments,
        gamma.requires_grad_(),
        beta.requires_grad_(),
        randn(65, 20).requires_grad_(),
        labels,
        normalize=True,
        temperature=0.5,
        needs_grad_projection=True,
    )
    assert not any(t.requires_grad for t in result)


NAMES = [f"{name} {shape}" for name in ("y", "z", "exp_avg_sq") for shape in SHAPES]


def test_schedulefree_step_equals_the_package(kernels: ModuleType) -> None:
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02, "warmup_steps": 10}
    ours = Trajectory(kernels, torch.float32, lr=0.01)
    results = []
    for dtype in (torch.float32, torch.float64):
        parameters = [
            torch.nn.Parameter(arrange(p.to(DEVICE, dtype), "channels_last")) for p in starts()
        ]
        optimizer = AdamWScheduleFree(parameters, lr=0.01, foreach=False, **options)
        optimizer.train()
        for step in range(100):
            for p, g in zip(parameters, gradients_of(step), strict=True):
                p.grad = g.to(dtype)
            optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        tensors = [p.detach() for p in parameters]
        results.append([*tensors, *(s["z"] for s in states), *(s["exp_avg_sq"] for s in states)])
    for step in range(100):
        ours.step(gradients_of(step), **options)
    check(ours.tensors(), *results, NAMES)
    (group,) = optimizer.param_groups
    expected = [100, group["weight_sum"], 0.01, group["lr_max"]]
    assert [t.item() for t in ours.state] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    "options",
    [
        {"averages_by_bias_correction": True},
        {"averages_by_bias_correction": True, "warmup_steps": 5},
        {"r": 0.7, "weight_lr_power": 1.5, "warmup_steps": 3},
        {"r": 1.0, "weight_lr_power": 0.0},
        {"betas": (0.0, 0.999), "weight_lr_power": 1.0},
    ],
    ids=str,
)
def test_schedulefree_step_equals_the_reference(
    kernels: ModuleType, options: dict[str, object]
) -> None:
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | options
    ours = Trajectory(kernels, torch.float32, lr=0.01)
    low = Trajectory(reference, torch.float32, lr=0.01)
    exact = Trajectory(reference, torch.float64, lr=0.01)
    for step in range(30):
        for trajectory in (ours, low, exact):
            if step == 20:
                trajectory.state.lr.fill_(0.003)
            trajectory.step(gradients_of(step), **options)
    check(ours.tensors(), low.tensors(), exact.tensors(), NAMES)
    expected = [t.item() for t in exact.state]
    assert [t.item() for t in ours.state] == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_rate_of_zero_moves_nothing(kernels: ModuleType) -> None:
    ours = Trajectory(kernels, torch.float32, lr=0.0)
    ours.step(gradients_of(0), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert all(map(torch.equal, ours.y, ours.z))
    assert [t.item() for t in ours.state] == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_channels", "size"), [(1, (5, 7)), (3, (6, 4)), (4, (20, 31))])
def test_augment(
    kernels: ModuleType, num_channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    heights, widths = torch.tensor([6, 9, 3, 6, 1]), torch.tensor([5, 4, 8, 5, 1])
    sizes = heights * widths
    count = len(sizes)
    crops = Crops(
        pixels=torch.randint(256, (int(sizes.sum()), num_channels), dtype=torch.uint8),
        offsets=sizes.cumsum(0) - sizes,
        heights=heights,
        widths=widths,
        top=torch.tensor([0, -2, 1, 40, -1]),
        left=torch.tensor([0, 2, -3, 0, 0]),
        flip=torch.tensor([False, True, True, False, True]),
        box=torch.tensor(
            [[0, 0, 0, 0], [1, 1, 2, 3], [-1, -1, 3, 2], [0, 0, 50, 50], [4, 2, 9, 9]],
            dtype=torch.int32,
        ),
    )
    crops = Crops(*(t.to(DEVICE) for t in crops))
    mean, std = torch.rand(num_channels).to(DEVICE), torch.rand(num_channels).to(DEVICE) + 0.1
    images = kernels.augment(crops, mean, std, size=size, dtype=dtype)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (count, num_channels, *size)
    low = reference.augment(crops, mean, std, size=size, dtype=dtype)
    exact = reference.augment(crops, mean.double(), std.double(), size=size, dtype=torch.float64)
    check([images], [low], [exact], ["images"])
    assert torch.equal(images == 0, low == 0)


def test_float64_is_refused(kernels: ModuleType) -> None:
    z, stats, gamma, beta = (wide(i) for i in block_inputs((2, 3, 4, 4), torch.float32, "strided"))
    moments, labels = Moments(z, z), torch.zeros(2, dtype=torch.int64)
    calls = [
        lambda: kernels.channel_stats(z, eps=1e-5),
        lambda: kernels.block_forward(z, stats, gamma, beta, negative_slope=0.1, latent_size=2),
        lambda: kernels.local_head(
            moments, gamma, beta, z[:, :, 0, 0], labels, normalize=True, temperature=1.0
        ),
        lambda: kernels.block_backward(z, z, stats, gamma, beta, gamma, beta, negative_slope=0.1),
        lambda: kernels.norm_backward(z, z, stats, gamma, beta, negative_slope=0.1),
        lambda: Trajectory(kernels, torch.float64, lr=0.01).step(
            gradients_of(0), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        ),
        lambda: kernels.augment(None, gamma, beta, size=(2, 2), dtype=torch.float64),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"float64. Use the compiled or reference backend"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device on this machine")
def test_a_captured_step_equals_an_eager_one(kernels: ModuleType) -> None:
    z, _, gamma, beta = block_inputs((8, 20, 8, 8), torch.float32, "channels_last")
    labels = torch.randint(10, (8,)).to(DEVICE)
    basis = official_basis(10, 80, is_square=False)
    trajectory = Trajectory(kernels, torch.float32, lr=0.01)
    weight_gradients = [torch.clone(g) for g in gradients_of(0)]

    def step() -> list[Tensor]:
        mine = z.clone()
        stats = kernels.channel_stats(mine, eps=1e-5)
        output, moments = kernels.block_forward(
            mine, stats, gamma, beta, negative_slope=0.1, latent_size=2, max_pool=2
        )
        head = kernels.local_head(
            moments, gamma, beta, basis, labels, normalize=True, temperature=0.5
        )
        grads = (head.grad_gamma, head.grad_beta)
        kernels.block_backward(
            mine, head.grad_latents, stats, gamma, beta, *grads, negative_slope=0.1
        )
        trajectory.step(weight_gradients, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        return [output, head.loss, mine, *grads]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    assert all(map(torch.equal, captured, expected))
    assert trajectory.state.step.item() == 5
