"""Every op of the reference against float64 autograd, and of the compiled backend against it.

The triton backend has a file of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from locallearn.kernels import (
    ChannelStats,
    Crops,
    Kernels,
    Moments,
    PeriodicBasis,
    ScheduleFreeState,
    load_kernels,
)
from locallearn.kernels.periodic_basis import periodic_basis
from locallearn.kernels.reference.schedulefree_step import SLICE_VALUES

REFERENCE = load_kernels("reference")
# Each shape and setting takes a second or two to compile for, and is compiled for once: a shape is
# there for what can break on it, and else has the channels, features, classes and slope of the
# networks in tests/engine/test_closed_form.py, as have the tests of one op that follow.
SLOPE = 0.01
CHANNELS, FEATURES, NUM_CLASSES = 6, 16, 4

# shape of z, s, max-pool, and why the row is there
SHAPES = [
    ((2, 6, 7, 7), 2, 2, "overlapping cells, rows left over by the max-pool"),
    ((3, 6, 8, 8), 4, 2, "equal cells, pooled"),
    ((2, 200, 2, 4), 2, 1, "many channels, no max-pool, not square"),
    ((2, 1, 5, 9), 3, 2, "one channel, overlapping on one side alone"),
    ((2, 6, 2, 2), 4, 1, "fewer positions than cells: cells repeat"),
    ((1, 5, 4, 4), 1, 1, "batch of one, one cell"),
    ((6, 16), 16, 1, "linear"),
    ((5, 16), 5, 1, "linear, overlapping windows"),
    ((5, 16), 8, 1, "linear, equal windows"),
    ((5, 16), 40, 1, "linear, features repeat"),
    ((2, 1), 1, 1, "linear, the smallest"),
]
# The narrow dtypes on the shape with the most that can break.
BLOCKS = [(*row, torch.float64) for row in SHAPES]
BLOCKS += [(*row, dtype) for row in SHAPES[:1] for dtype in (torch.float32, torch.bfloat16)]
LAYOUTS = ["channels_last", "strided"]


@pytest.fixture(scope="module", params=["reference", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "compiled":
        request.getfixturevalue("needs_compiler")
    return load_kernels(request.param)


pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.filterwarnings("default"),  # what torch's compiler warns of is not ours
]


def arrange(z: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and z.ndim == 4:
        return z.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([z, z], dim=-1)[..., 0]
    return z


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
    """z, gamma, beta; no activation so near to zero that rounding could turn its sign."""
    channels = shape[1]
    gamma, beta = torch.rand(channels).double() + 0.5, torch.randn(channels).double() * 0.3
    while True:
        z = (torch.randn(shape) * 2 + 1).to(dtype)
        axes = [0, *range(2, len(shape))]
        xh = F.batch_norm(z.double(), None, None, gamma, beta, training=True, eps=1e-5)
        if xh.abs().min() > 1e-3 and z.float().var(dim=axes, correction=0).min() > 0.01:
            return z, gamma, beta


def labels_and_projection(shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    length = shape[1] * size**2 if len(shape) == 4 else size
    labels = torch.randint(NUM_CLASSES, shape[:1])
    return labels, torch.randn(NUM_CLASSES, length).double()


def bound(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= bound(dtype) * (1 + scale), f"{what}: {error:.1e} of {scale:.1e}"


def statistics(kernels: Kernels, z: Tensor) -> ChannelStats:
    """With running ones, as a network keeps them."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    running = torch.zeros(z.shape[1], dtype=dtype), torch.ones(z.shape[1], dtype=dtype)
    return kernels.channel_stats(z, *running, eps=1e-5)


def forward_and_backward(
    kernels: Kernels,
    z: Tensor,
    gamma,
    beta,
    size: int,
    pool: int,
    labels,
    d,
    similarity: float = 0.0,
):
    stats = statistics(kernels, z)
    output, moments = kernels.block_forward(
        z, stats, gamma, beta, negative_slope=SLOPE, latent_size=size, max_pool=pool
    )
    head = kernels.local_head(
        moments,
        gamma,
        beta,
        d,
        labels,
        normalize=True,
        temperature=0.5,
        similarity=similarity,
        needs_grad_projection=True,
    )
    written = z.clone(memory_format=torch.preserve_format)
    grad_z = kernels.block_backward(
        written,
        head.grad_latents,
        stats,
        gamma,
        beta,
        head.grad_gamma,
        head.grad_beta,
        negative_slope=SLOPE,
    )
    assert grad_z.data_ptr() == written.data_ptr(), "the gradient lies in z's memory"
    return output, head, grad_z


def autograd(z: Tensor, gamma, beta, size: int, pool: int, labels, d, similarity: float = 0.0):
    """The same from autograd of the definition."""
    z, gamma, beta, d = (t.detach().clone().requires_grad_() for t in (z, gamma, beta, d))
    h = F.leaky_relu(F.batch_norm(z, None, None, gamma, beta, training=True, eps=1e-5), SLOPE)
    output = F.max_pool2d(h, pool) if pool > 1 else h
    if z.ndim == 4:
        p = F.adaptive_avg_pool2d(h, size).flatten(1)
    else:
        p = F.adaptive_avg_pool1d(h, d.shape[1])
    loss = F.cross_entropy(F.normalize(p, dim=1) @ d.T / 0.5, labels)
    if similarity:
        rows = (p, F.one_hot(labels, len(d)).to(p.dtype))
        s, y = (F.normalize(r - r.mean(0)) for r in rows)
        loss = loss + similarity * F.mse_loss(s @ s.T, y @ y.T)
    return output.detach(), loss.detach(), torch.autograd.grad(loss, (z, gamma, beta, d))


@pytest.mark.parametrize(
    ("shape", "size", "pool"),
    [((5, 6, 7, 7), 2, 2), ((4, 16), 8, 1)],
    ids=["convolutional", "linear"],
)
def test_a_block_with_similarity_matches_autograd(kernels, shape, size, pool) -> None:
    z, gamma, beta = case(shape)
    labels, d = labels_and_projection(shape, size)
    of_block = (gamma, beta, size, pool, labels, d, 10.0)
    _, loss, gradients = autograd(z, *of_block)
    _, head, grad_z = forward_and_backward(kernels, arrange(z, "channels_last"), *of_block)
    found = (grad_z, head.grad_gamma, head.grad_beta, head.grad_projection)
    assert_near(head.loss, loss, torch.float64, "loss")
    for name, actual, expected in zip("zgbd", found, gradients, strict=True):
        assert_near(actual, expected, torch.float64, name)


@pytest.mark.parametrize(("shape", "size", "pool", "why", "dtype"), BLOCKS, ids=str)
def test_a_whole_block_matches_autograd(kernels, shape, size, pool, why, dtype) -> None:
    z, gamma, beta = case(shape, dtype)
    labels, d = labels_and_projection(shape, size)
    output, loss, (grad_z, grad_gamma, grad_beta, grad_d) = autograd(
        z.double(), gamma, beta, size, pool, labels, d
    )
    small = torch.float64 if dtype == torch.float64 else torch.float32
    out, head, gz = forward_and_backward(
        kernels,
        arrange(z, "channels_last"),
        gamma.to(small),
        beta.to(small),
        size,
        pool,
        labels,
        d.to(small),
    )
    assert out.dtype == gz.dtype == dtype
    assert {t.dtype for t in (head.loss, head.logits, head.grad_gamma)} == {small}
    assert_near(out, output, dtype, "output")
    # The moments and what follows from them are wide: bf16 rounds z alone, as it does for autograd.
    assert_near(head.loss, loss, small, "loss")
    assert_near(gz, grad_z, dtype, "grad_z")
    assert_near(head.grad_gamma, grad_gamma, small, "grad_gamma")
    assert_near(head.grad_beta, grad_beta, small, "grad_beta")
    assert_near(head.grad_projection, grad_d, small, "grad_projection")
    assert head.num_correct.item() == (head.logits.argmax(1) == labels).sum().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "size", "pool"), [((3, 6, 7, 7), 2, 2), ((3, 6, 8, 8), 4, 2), ((4, 16), 16, 1)]
)
def test_memory_layout_changes_nothing(kernels, shape, size, pool, layout) -> None:
    z, gamma, beta = case(shape)
    labels, d = labels_and_projection(shape, size)
    expected = forward_and_backward(REFERENCE, z, gamma, beta, size, pool, labels, d)
    actual = forward_and_backward(kernels, arrange(z, layout), gamma, beta, size, pool, labels, d)
    assert_near(actual[0], expected[0], z.dtype, "output")
    assert_near(actual[2], expected[2], z.dtype, "grad_z")


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_relu_and_no_activation(kernels, slope) -> None:
    z, gamma, beta = case((3, CHANNELS, 6, 6))
    stats = statistics(kernels, z)
    out, _ = kernels.block_forward(
        z, stats, gamma, beta, negative_slope=slope, latent_size=None, max_pool=1
    )
    expected = F.batch_norm(z, None, None, gamma, beta, training=True, eps=1e-5)
    assert_near(out, F.leaky_relu(expected, slope), z.dtype, "output")


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_channel_stats_update_what_batch_norm_would(kernels, momentum) -> None:
    z, _, _ = case((3, CHANNELS, 5, 5))
    norm = nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64).train()
    mean, var = norm.running_mean.clone() + 1, norm.running_var.clone() * 2
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm(z)
    stats = kernels.channel_stats(z, mean, var, eps=norm.eps, momentum=momentum)
    assert_near(stats.mean, z.mean((0, 2, 3)), z.dtype, "mean")
    assert_near(stats.inv_std, (z.var((0, 2, 3), correction=0) + norm.eps).rsqrt(), z.dtype, "std")
    assert_near(mean, norm.running_mean, z.dtype, "running mean")
    assert_near(var, norm.running_var, z.dtype, "running variance")


@pytest.mark.parametrize("mean", [1e4, -3e5])
def test_a_mean_far_from_zero_costs_no_digits(kernels, mean) -> None:
    """Where the sum of squares minus the square of the sum would leave nothing."""
    z = (torch.randn(16, CHANNELS, 8, 8, dtype=torch.float64) * 0.7 + mean).float()
    stats = kernels.channel_stats(z, eps=1e-5)
    var = z.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(stats.mean.double(), z.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(stats.inv_std.double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(3, CHANNELS, 6, 5), (2, 1, 5, 3), (6, FEATURES)], ids=str)
def test_norm_backward_matches_autograd(kernels, shape) -> None:
    z, gamma, beta = case(shape)
    leaves = [t.clone().requires_grad_() for t in (z, gamma, beta)]
    h = F.leaky_relu(F.batch_norm(leaves[0], None, None, *leaves[1:], training=True), SLOPE)
    grad = torch.randn_like(h)
    expected = torch.autograd.grad(h, leaves, grad)
    stats = statistics(kernels, z)
    actual = kernels.norm_backward(z, grad.clone(), stats, gamma, beta, negative_slope=SLOPE)
    for a, e, what in zip(actual, expected, ("z", "gamma", "beta"), strict=True):
        assert_near(a, e, z.dtype, what)


@pytest.mark.parametrize("is_square", [False, True])
def test_periodic_bases_are_made_on_the_fly(kernels, is_square) -> None:
    basis = PeriodicBasis(
        torch.tensor([0.25, 8.0 + 1 / 3, 81.4873]).double(),
        torch.tensor([0.0, 0.25, 0.9]).double(),
        16,
        is_square,
    )
    t = torch.arange(16)
    d = torch.sin(2 * torch.pi * (basis.first_phase[:, None] + basis.turns[:, None] * t))
    d = torch.where(d.abs() < 1e-9, 0.0, d)
    d = d.sign() if is_square else d
    torch.testing.assert_close(periodic_basis(basis), d, rtol=0, atol=1e-12)
    moments = Moments(*torch.randn(2, 4, 4, 2, 2).double())
    gamma, beta, labels = torch.rand(4).double(), torch.randn(4).double(), torch.randint(3, (4,))
    settings = {"normalize": False, "temperature": 1.0, "label_smoothing": 0.1}
    given = REFERENCE.local_head(moments, gamma, beta, d, labels, **settings)
    made = kernels.local_head(moments, gamma, beta, basis, labels, **settings)
    assert_near(made.loss, given.loss, torch.float64, "loss")
    assert_near(made.grad_latents, given.grad_latents, torch.float64, "grad_latents")


# -- the optimizer's step -----------------------------------------------------------------------


def clock() -> ScheduleFreeState:
    zero = torch.zeros((), dtype=torch.float64)
    return ScheduleFreeState(zero.clone(), zero.clone(), zero + 0.01, zero - 1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1, "warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.0}],
    ids=str,
)
def test_schedulefree_step_is_the_packages(kernels, settings) -> None:
    shapes = [(4, 3, 3, 3), (4,), (5, 7), ()]
    layout = torch.channels_last
    theirs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    theirs[0] = theirs[0].detach().contiguous(memory_format=layout).requires_grad_()
    ours = [t.detach().clone(memory_format=torch.preserve_format) for t in theirs]
    z = [t.clone(memory_format=torch.preserve_format) for t in ours]
    v = [torch.zeros_like(t) for t in ours]
    package = AdamWScheduleFree(theirs, lr=0.01, betas=(0.9, 0.99), foreach=False, **settings)
    package.train()
    state = clock()
    settings = {"weight_decay": 0.0, **settings}
    for _ in range(100):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for t, gradient in zip(theirs, gradients, strict=True):
            t.grad = gradient.clone()
        package.step()
        kernels.schedulefree_step(
            ours, gradients, z, v, state, betas=(0.9, 0.99), eps=1e-8, **settings
        )
    group = package.param_groups[0]
    assert state.step.item() == group["k"] == 100
    assert state.weight_sum.item() == pytest.approx(group["weight_sum"], rel=1e-12)
    assert state.lr_max.item() == pytest.approx(group["lr_max"], rel=1e-12)
    for a, b, z_i, v_i in zip(ours, theirs, z, v, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(z_i, package.state[b]["z"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(v_i, package.state[b]["exp_avg_sq"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(SLICE_VALUES + 3,), (1024, 520)])
def test_schedulefree_step_of_large_parameters(kernels, shape) -> None:
    """Larger than the reference takes at a time."""
    theirs = torch.randn(shape, dtype=torch.float64).requires_grad_()
    ours, v, state = theirs.detach().clone(), torch.zeros(shape, dtype=torch.float64), clock()
    z = ours.clone()
    package = AdamWScheduleFree([theirs], lr=0.01, betas=(0.9, 0.99), foreach=False)
    package.train()
    for _ in range(3):
        theirs.grad = torch.randn(shape, dtype=torch.float64)
        kernels.schedulefree_step(
            [ours],
            [theirs.grad.clone()],
            [z],
            [v],
            state,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
        )
        package.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z, package.state[theirs]["z"], rtol=1e-10, atol=1e-12)


def test_averaging_by_bias_correction(kernels) -> None:
    """x_n is the average of z_1..z_n by 1 - beta2^k, worked out from all of them."""
    y, state = torch.tensor([1.0, -2.0], dtype=torch.float64), clock()
    z, v = y.clone(), torch.zeros_like(y)
    points, weights = [], []
    for k in range(1, 8):
        kernels.schedulefree_step(
            [y],
            [torch.randn(2, dtype=torch.float64)],
            [z],
            [v],
            state,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            averages_by_bias_correction=True,
        )
        points.append(z.clone())
        weights.append(1 - 0.99**k)
    x = sum(w * p for w, p in zip(weights, points, strict=True)) / sum(weights)
    torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=1e-10, atol=1e-12)


# -- augmentation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, torch.float32), (3, torch.float32), (3, torch.bfloat16)]
)
def test_augment_equals_the_reference(kernels, channels, dtype) -> None:
    heights, widths = torch.tensor([7, 9, 8]), torch.tensor([8, 7, 11])
    areas = heights * widths
    crops = Crops(
        torch.randint(256, (int(areas.sum()), channels), dtype=torch.uint8),
        areas.cumsum(0) - areas,
        heights,
        widths,
        torch.tensor([-2, 3, 0]),
        torch.tensor([1, -1, 5]),
        torch.tensor([True, False, True]),
        torch.tensor([[0, 0, 0, 0], [1, 2, 3, 9], [4, 4, 1, 1]], dtype=torch.int32),
    )
    mean, std = torch.rand(channels), torch.rand(channels) + 0.1
    expected = REFERENCE.augment(crops, mean, std, size=(6, 5))
    actual = kernels.augment(crops, mean, std, size=(6, 5), dtype=dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(actual, expected.to(dtype), rtol=tolerance, atol=tolerance)
