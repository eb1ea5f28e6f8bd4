"""The registry, the bases, the heads, and new rules in a few lines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model, build_rule, list_rules
from locallearn.rules import (
    BASES,
    SETTINGS,
    HeadSpec,
    Information,
    LatentHead,
    LatentRule,
    ProjectionHead,
    ProjectionRule,
    Requirement,
    build_basis,
    parse_rule,
    register_rule,
    rule_class,
    unregister_rule,
)

PERIODIC = ["lls", "lls-m", "lls-mxm", "lls-mxm-reduced", "lls-s"]
SPEC = HeadSpec(latent_length=24, num_classes=7, dtype=torch.float64)


def test_what_is_registered() -> None:
    others = ["bp", "dfa", "drtp", "local-losses", "pepita", "sdfa"]
    assert list_rules() == sorted([*others, *PERIODIC])
    assert list_rules("lls*") == sorted(PERIODIC)
    for name in list_rules():
        cls = rule_class(name)
        assert cls.name == name
        assert cls.summary
        assert cls.trains
        assert isinstance(cls.requires, Requirement)
        assert cls.learns_from <= set(Information)
    waiting = {
        "bp": Requirement.END_TO_END,
        "dfa": Requirement.GLOBAL_ERROR,
        "sdfa": Requirement.GLOBAL_ERROR,
        "pepita": Requirement.TWO_FORWARDS,
    }
    for name in list_rules():
        assert rule_class(name).requires is waiting.get(name, Requirement.LOCAL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_rule("lls-mx"), r"unknown rule 'lls-mx'. Did you mean 'lls-m"),
        (lambda: build_rule("lls", basis="sine"), r"unknown basis 'sine'.* Valid: cosine"),
        (lambda: build_rule("lls", setting="papers"), r"Did you mean 'paper'"),
        (lambda: build_rule("bp", basis="square"), r"rule 'bp' has no option 'basis'; it has: lab"),
        (lambda: build_rule("lls", temperature=0.0), r"temperature must be above 0, got 0.0"),
        (lambda: build_rule("lls", label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
        (lambda: build_rule("lls-mxm-reduced", num_waves=0), r"num_waves must be at least 1"),
        (
            lambda: build_rule("lls-mxm-reduced", m_start="identity"),
            r"gives each class a wave of its own.* use lls-mxm",
        ),
        (lambda: build_rule("lls-m", m_start="eye"), r"unknown m_start 'eye'.* identity"),
        (lambda: build_rule("lls", similarity=-1.0), r"similarity must be at least 0, got -1.0"),
        (
            lambda: build_rule("local-losses", local_loss="sims"),
            r"unknown local_loss 'sims'. Did you mean 'sim'",
        ),
        (
            lambda: build_rule("local-losses", local_loss="sim", similarity=1.0),
            r"'sim' is a similarity match itself",
        ),
        (
            lambda: build_rule("local-losses", local_loss="sim", temperature=1.0),
            r"temperature divides logits, and local_loss 'sim' has none",
        ),
        (
            lambda: build_rule("pepita", update_order="last"),
            r"unknown update_order 'last'",
        ),
        (lambda: build_rule("pepita", feedback_scale=0.0), r"feedback_scale must be above 0"),
        (
            lambda: build_rule("bp", bp_memory="accumulate"),
            r"unknown bp_memory 'accumulate'. Valid: plain, checkpoint, accumulate:N, fused",
        ),
        (lambda: build_rule("bp", bp_memory="accumulate:0"), r"unknown bp_memory 'accumulate:0'"),
        (lambda: build_rule("bp", bp_memory="accumulate:N"), r"unknown bp_memory 'accumulate:N'"),
    ],
)
def test_errors_say_what_is_valid(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("name", ["bp", *PERIODIC, "local-losses"])
def test_options_rebuild_the_rule(name: str) -> None:
    rule = build_rule(name, label_smoothing=0.1)
    assert build_rule(name, **rule.options()) == rule


def test_official_bases_are_the_published_codes() -> None:
    cosine = build_basis("cosine", "official", 3, 5, dtype=torch.float64)
    for row, frequency in zip(cosine, (50.0, 281.0, 512.0), strict=True):
        expected = [math.sin(frequency * t) for t in range(5)]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)
    square = build_basis("square", "official", 3, 5, dtype=torch.float64)
    assert torch.equal(square, cosine.sign())
    assert square[:, 0].tolist() == [0.0, 0.0, 0.0]  # sin(0)


def test_paper_bases_follow_the_text() -> None:
    length = 8
    cosine = build_basis("cosine", "paper", 4, length, dtype=torch.float64)
    for c, row in enumerate(cosine):  # 1, 2, 3 and 4 periods over the latent
        expected = [math.cos(2 * math.pi * (c + 1) * t / length) for t in range(1, length + 1)]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)
    # Waves of whole periods are orthogonal: distinct frequencies.
    gram = cosine @ cosine.T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-12
    assert set(build_basis("square", "paper", 10, 100).unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_random_basis_is_drawn_long_and_pooled() -> None:
    torch.manual_seed(3)
    long = 0.1 * torch.randn(4, 12)
    torch.manual_seed(3)
    assert torch.equal(
        build_basis("random", "official", 4, 6, basis_length=12), F.adaptive_avg_pool1d(long, 6)
    )
    assert build_basis("random", "official", 50, 400).std().item() == pytest.approx(0.1, rel=0.05)


def test_float64_bases_are_exact_and_float32_ones_their_rounding() -> None:
    exact = build_basis("cosine", "official", 10, 2048, dtype=torch.float64)
    rounded = build_basis("cosine", "official", 10, 2048)
    assert torch.equal(rounded, exact.float())


@pytest.mark.parametrize(
    ("name", "num"),
    [("lls", 0), ("lls-m", 7), ("lls-mxm", 49), ("lls-mxm-reduced", 20 * 7), ("local-losses", 168)],
)
def test_additional_parameters(name: str, num: int) -> None:
    head = build_rule(name).build_head(SPEC)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == num


@pytest.mark.parametrize("name", [*PERIODIC, "local-losses"])
def test_projection_backward_matches_autograd(name: str) -> None:
    head = build_rule(name).build_head(SPEC)
    grad = torch.randn(7, 24, dtype=torch.float64)
    parameters = list(head.parameters())
    if not parameters:
        assert name in ("lls", "lls-s")
        return
    expected = torch.autograd.grad(head.projection(), parameters, grad)
    head.projection_backward(grad)
    head.projection_backward(grad)  # adds, as autograd would
    for parameter, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", PERIODIC)
def test_signal_matches_autograd_of_the_formulas(name: str, basis: str, setting: str) -> None:
    """The head of every rule, written out here once more with B and M apart."""
    head = build_rule(name, basis=basis, setting=setting).build_head(SPEC)
    p = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (6,))
    q = p / p.norm(dim=1, keepdim=True) if basis != "random" else p
    correlation = q @ head.basis.T
    if name in ("lls", "lls-s"):
        logits = correlation
    elif name == "lls-m":
        logits = head.modulation * correlation
    else:
        logits = correlation @ head.modulation
    loss = F.cross_entropy(logits / 0.5, y)
    if name == "lls-s":
        s, t = (F.normalize(r - r.mean(0)) for r in (p, F.one_hot(y, 7).double()))
        loss = loss + 10 * F.mse_loss(s @ s.T, t @ t.T)
    parameters = list(head.parameters())
    expected = torch.autograd.grad(loss, [p, *parameters])

    signal = head.signal(p.detach(), y)
    torch.testing.assert_close(signal.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(signal.logits, logits.detach() / 0.5, rtol=1e-11, atol=1e-13)
    for actual, e in zip([signal.grad, *(x.grad for x in parameters)], expected, strict=True):
        assert (actual - e).norm() <= 1e-9 * e.norm()


def test_periodic_bases_stay_out_of_checkpoints_and_random_ones_do_not() -> None:
    assert "basis" not in build_rule("lls").build_head(SPEC).state_dict()
    assert "basis" in build_rule("lls", basis="random").build_head(SPEC).state_dict()


# -- a new rule of each kind, as a user would write it ------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Anchors(ProjectionRule):
    """A projection rule: one trained prototype for each class, of length one."""

    name: ClassVar[str] = "anchors"
    summary: ClassVar[str] = "cosine similarity with a trained prototype for each class"
    trains: ClassVar[str] = "K x T numbers for each block"

    def build_head(self, spec: HeadSpec) -> LatentHead:
        return AnchorsHead(spec, self)


class AnchorsHead(ProjectionHead):
    def __init__(self, spec: HeadSpec, rule: Anchors) -> None:
        super().__init__(normalize=True, temperature=rule.temperature, label_smoothing=0.0)
        self.anchors = nn.Parameter(torch.randn(spec.num_classes, spec.latent_length))

    def projection(self) -> Tensor:
        return F.normalize(self.anchors, dim=1)


@dataclass(frozen=True, kw_only=True)
class Margin(LatentRule):
    """A latent rule: multi-class hinge loss of the latents' first K values."""

    name: ClassVar[str] = "margin"
    summary: ClassVar[str] = "hinge loss of the latent's first K values"
    trains: ClassVar[str] = "nothing besides the network"

    def build_head(self, spec: HeadSpec) -> LatentHead:
        return MarginHead(spec.num_classes)


class MarginHead(LatentHead):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def loss(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = latents[:, : self.num_classes]
        return F.multi_margin_loss(logits, labels), logits


@pytest.mark.parametrize("cls", [Anchors, Margin])
def test_a_new_rule_takes_twenty_lines_and_learns(cls) -> None:
    register_rule(cls)
    try:
        assert cls.name in list_rules()
        learner = LocalLearner(
            build_model("smallconv", in_channels=1, num_classes=4), rule=cls.name, num_classes=4
        )
        images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
        first = learner.step(images, labels)
        for _ in range(30):
            last = learner.step(images, labels)
        assert list(first.block_losses) == ["conv1", "conv2", "conv3", "linear1"]
        for name, loss in last.block_losses.items():
            assert loss < first.block_losses[name], name
        assert (last.logits.argmax(1) == labels).float().mean() > 0.9
    finally:
        unregister_rule(cls.name)


def test_a_name_is_registered_once() -> None:
    taken = type("Waves", (rule_class("lls"),), {})
    message = r"rule 'lls' is registered already, as locallearn.rules.lls.LLS; give .*Waves another"
    with pytest.raises(UserError, match=message):
        register_rule(taken)


def test_a_rule_defined_anew_takes_its_own_place() -> None:
    """As when a cell of a notebook is run again."""
    again = dataclass(frozen=True, kw_only=True)(
        type("Anchors", (Anchors,), {"__module__": __name__, "__qualname__": "Anchors"})
    )
    try:
        register_rule(Anchors)
        assert register_rule(again) is rule_class("anchors")
    finally:
        unregister_rule("anchors")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"name": "margin:k"}, r"rule name 'margin:k' of .*Odd may hold letters, digits, '_', '.'"),
        ({"name": None}, r"rule class .*Odd needs the class attribute 'name', a str"),
        ({"name": "odd", "trains": None}, r"needs the class attribute 'trains', a str"),
        ({"name": "odd", "learns_from": []}, r"attribute 'learns_from', a frozenset"),
    ],
)
def test_a_rule_says_what_every_rule_says(said: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_rule(type("Odd", (Margin,), said))


def test_a_rule_with_options_as_text() -> None:
    assert parse_rule("lls") == build_rule("lls")
    expected = build_rule("lls-mxm", m_start="identity", similarity=2.5)
    assert parse_rule("lls-mxm:m-start=identity:similarity=2.5") == expected
    assert parse_rule("bp:bp_memory=accumulate:4") == build_rule("bp", bp_memory="accumulate:4")
    assert parse_rule("lls-mxm-reduced:num_waves=7").num_waves == 7
    assert parse_rule("lls:normalize=false") == build_rule("lls", normalize=False)
    assert parse_rule("lls:normalize=none:basis=random").normalize is None
    with pytest.raises(UserError, match="option 'similarity' of rule 'lls' is float, got 'much'"):
        parse_rule("lls:similarity=much")
    with pytest.raises(UserError, match="rule 'lls' has no option 'local_loss'"):
        parse_rule("lls:local_loss=sim")
    with pytest.raises(UserError, match="option 'normalize' of rule 'lls' is bool, got '1'"):
        parse_rule("lls:normalize=1")
    with pytest.raises(UserError, match="option 'basis' of rule 'lls' is given twice"):
        parse_rule("lls:basis=cosine:basis=square")
