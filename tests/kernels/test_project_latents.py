"""The head's closed form against autograd of its definition in float64, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from locallearn.kernels import label_similarity, match_similarity, project_latents

# N, T, K, and why the row is there
SIZES = [
    (8, 32, 10, "ordinary"),
    (1, 16, 10, "batch of one"),
    (8, 1, 10, "latent of one"),
    (8, 16, 1, "one class"),
    (8, 16, 2, "two classes"),
    (5, 3, 1000, "more classes than latents"),
]


def similarities(rows):
    """Cosine similarity of rows less their mean over the batch; none where nothing is left."""
    deviations = rows - rows.mean(0)
    q = F.normalize(torch.where(deviations.abs() < 1e-12, 0.0, deviations))
    return q @ q.T


def reference(p, d, y, *, normalize, temperature, label_smoothing, similarity=0.0):
    """Loss, logits, dL/dp and dL/dD from autograd of the formulas in plain PyTorch."""
    p, d = p.detach().clone().requires_grad_(), d.detach().clone().requires_grad_()
    q = F.normalize(p, dim=1) if normalize else p
    logits = q @ d.T / temperature
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    if similarity:
        onehot = F.one_hot(y, len(d)).to(p.dtype)
        loss = loss + similarity * F.mse_loss(similarities(p), similarities(onehot))
    grad_p, grad_d = torch.autograd.grad(loss, (p, d))
    return loss.detach(), logits.detach(), grad_p, grad_d


@pytest.mark.parametrize("similarity", [0.0, 10.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "t", "k", "why"), SIZES, ids=[s[3] for s in SIZES])
def test_closed_form_matches_autograd(
    n, t, k, why, normalize, temperature, label_smoothing, similarity
):
    p, d = torch.randn(n, t, dtype=torch.float64), torch.randn(k, t, dtype=torch.float64)
    y = torch.randint(k, (n,))
    settings = {
        "normalize": normalize,
        "temperature": temperature,
        "label_smoothing": label_smoothing,
        "similarity": similarity,
    }
    expected = reference(p, d, y, **settings)
    actual = project_latents(p, d, y, **settings, needs_grad_projection=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)


def test_by_hand() -> None:
    # p = (3, 4), so q = (0.6, 0.8); D the identity; temperature 1/2: logits (1.2, 1.6).
    result = project_latents(
        torch.tensor([[3.0, 4.0]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        torch.tensor([0]),
        normalize=True,
        temperature=0.5,
        needs_grad_projection=True,
    )
    share = math.exp(1.2) / (math.exp(1.2) + math.exp(1.6))
    e = (share - 1) / 0.5  # of class 0; class 1 has the opposite
    radial = 0.6 * e - 0.8 * e
    assert result.loss.item() == pytest.approx(-math.log(share))
    assert result.logits.tolist()[0] == pytest.approx([1.2, 1.6])
    assert result.grad_latents.tolist()[0] == pytest.approx(
        [(e - 0.6 * radial) / 5, (-e - 0.8 * radial) / 5]
    )
    assert result.grad_projection is not None
    assert result.grad_projection.tolist()[0] == pytest.approx([0.6 * e, 0.8 * e])


def test_similarity_by_hand() -> None:
    # Less their mean (1, 0), the latents (1, 1), (1, -1) are (0, 1) and (0, -1): S is -1 between
    # them, as Y is of two classes. Nothing is left to learn.
    p = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    result = match_similarity(p, torch.tensor([0, 1]), 2)
    assert result.loss.item() == pytest.approx(0.0)
    assert result.grad_latents.abs().max() < 1e-12
    # Four latents about zero, along the axes, each pair of opposites one class. S is -1 between
    # opposites and 0 between neighbours, where Y is 1 and -1: the differences are -2 and 1, eight
    # times and four, so that the mean square is (4 * 4 + 8 * 1) / 16.
    p = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    result = match_similarity(p, torch.tensor([0, 0, 1, 1]), 2)
    assert result.loss.item() == pytest.approx(24 / 16)
    # (S - Y) q of the first: -2 (-1, 0) + 1 (0, 1) + 1 (0, -1) = (2, 0), along itself: no length
    # helps, and a saddle has no gradient.
    assert result.grad_latents.abs().max() < 1e-12
    # Turned by a quarter, latent 3 lies where latent 1 does, so that the classes share a side.
    p = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    before = match_similarity(p, torch.tensor([0, 1, 0, 1]), 2)
    after = match_similarity(p - 0.1 * before.grad_latents, torch.tensor([0, 1, 0, 1]), 2)
    assert after.loss < before.loss


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_label_similarity_is_that_of_one_hot_labels(num_classes: int) -> None:
    labels = torch.randint(num_classes, (9,))
    onehot = F.one_hot(labels, num_classes).double()
    q = F.normalize(onehot - onehot.mean(1, keepdim=True))
    actual = label_similarity(labels, num_classes, torch.float64)
    torch.testing.assert_close(actual, q @ q.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [4, 27, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_that_are_all_alike_are_drawn_nowhere(dtype: torch.dtype, length: int) -> None:
    p = torch.full((7, length), 0.1, dtype=dtype)  # whose mean is not 0.1 to the last digit
    result = match_similarity(p, torch.tensor([0, 1, 0, 1, 1, 0, 1]), 2)
    assert result.loss.isfinite()
    assert result.grad_latents.abs().max() == 0
    one = match_similarity(torch.randn(1, length, dtype=dtype), torch.tensor([1]), 2)
    assert one.loss == 0
    assert one.grad_latents.abs().max() == 0


def test_latents_of_zero_learn_nothing_and_stay_finite() -> None:
    p = torch.zeros(2, 4)
    p[1] = torch.randn(4)
    labels = torch.tensor([0, 1])
    result = project_latents(p, torch.randn(3, 4), labels, normalize=True, temperature=0.5)
    assert result.loss.isfinite()
    assert result.grad_latents[0].tolist() == [0.0] * 4
    assert result.grad_latents[1].abs().sum() > 0


def test_no_projection_gradient_unless_wanted() -> None:
    p, d, y = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    assert project_latents(p, d, y, normalize=True, temperature=1.0).grad_projection is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_latents_are_computed_in_float32(dtype: torch.dtype) -> None:
    p, d, y = torch.randn(8, 16).to(dtype), torch.randn(5, 16), torch.randint(5, (8,))
    settings = {"normalize": True, "temperature": 0.5, "needs_grad_projection": True}
    low = project_latents(p, d, y, **settings)
    full = project_latents(p.float(), d, y, **settings)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_float32_error_is_that_of_plain_pytorch() -> None:
    p, d, y = torch.randn(64, 512), torch.randn(10, 512).sign(), torch.randint(10, (64,))
    settings = {"normalize": True, "temperature": 0.5, "label_smoothing": 0.1}
    exact = reference(p.double(), d.double(), y, **settings)
    plain = reference(p, d, y, **settings)
    ours = project_latents(p, d, y, **settings, needs_grad_projection=True)
    for e, a, b in zip(exact, ours, plain, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + floor


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_strides_do_not_matter(layout: str) -> None:
    p, d, y = torch.randn(6, 8), torch.randn(4, 8), torch.randint(4, (6,))
    odd = p.T.contiguous().T if layout == "transposed" else torch.stack([p, p], -1)[..., 0]
    a = project_latents(p, d, y, normalize=True, temperature=0.5)
    b = project_latents(odd, d, y, normalize=True, temperature=0.5)
    torch.testing.assert_close(a.grad_latents, b.grad_latents)
