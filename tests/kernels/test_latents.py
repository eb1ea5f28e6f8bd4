"""Pooling and its adjoint against the definition, by hand and by autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from locallearn.kernels import pool_latents, unpool_latents

# shape, size, and why the row is there
CASES = [
    ((2, 3, 8, 8), 4, "equal cells"),
    ((2, 3, 8, 4), 2, "cells that are not square"),
    ((2, 3, 7, 7), 2, "overlapping windows"),
    ((2, 3, 5, 9), 3, "overlapping on one side, not on the other"),
    ((2, 3, 1, 1), 2, "fewer positions than cells: windows repeat"),
    ((1, 1, 1, 1), 1, "the smallest"),
    ((2, 3, 6, 6), 1, "one cell"),
    ((2, 3, 4, 4), 4, "a cell for each position"),
    ((3, 12), 12, "linear, as it is"),
    ((3, 12), 4, "linear, equal windows"),
    ((3, 10), 4, "linear, overlapping windows"),
    ((3, 6), 12, "linear, latent longer than the features"),
    ((1, 1), 1, "linear, the smallest"),
]
LAYOUTS = ["contiguous", "channels_last", "strided"]


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


def definition(x: torch.Tensor, size: int) -> torch.Tensor:
    if x.ndim == 4:
        return F.adaptive_avg_pool2d(x, size).flatten(1)
    return F.adaptive_avg_pool1d(x, size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size", "why"), CASES, ids=[c[2] for c in CASES])
def test_latents_and_adjoint_match_autograd(
    shape: tuple[int, ...], size: int, why: str, layout: str
) -> None:
    x = arrange(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    latents = definition(x, size)
    grad = torch.randn_like(latents)
    (expected,) = torch.autograd.grad(latents, x, grad)

    torch.testing.assert_close(pool_latents(x.detach(), size), latents.detach(), rtol=0, atol=1e-14)
    actual = unpool_latents(grad, x.detach(), size)
    assert actual.shape == x.shape
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-15)


def test_overlapping_windows_by_hand() -> None:
    # 3 -> 2: rows 0-1 and 1-2, each a mean of two; the middle row lies in both.
    x = torch.tensor([[1.0, 2.0, 6.0]])
    assert pool_latents(x, 2).tolist() == [[1.5, 4.0]]
    assert unpool_latents(torch.tensor([[2.0, 4.0]]), x, 2).tolist() == [[1.0, 3.0, 2.0]]


def test_channels_last_stays_channels_last() -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    grad = unpool_latents(torch.randn(2, 48), x, 4)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_gradient_takes_the_activations_dtype() -> None:
    x = torch.randn(2, 3, 7, 7, dtype=torch.bfloat16)
    assert unpool_latents(torch.randn(2, 12), x, 2).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\) or \(N, F\)"):
        pool_latents(torch.zeros(shape), 2)
