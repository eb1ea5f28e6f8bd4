"""LLS and its variants: synchronise each block's latent with its class's wave.

Shapes: K classes, R rows of a reduced basis, T latent length.

Source: Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by
Neural Activity Synchronization", WACV 2025, arXiv 2405.15868.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locallearn.errors import UserError, unknown_name
from locallearn.rules.base import (
    HeadSpec,
    ProjectionHead,
    ProjectionRule,
    accumulate_grad,
    register_rule,
)
from locallearn.rules.bases import build_basis, check_basis

_MODULATION_SCALE = 0.01  # M starts at 0.01 * N(0, 1), as in the authors' code
M_STARTS = ("official", "identity")


class BasisHead(ProjectionHead):
    """D = B, fixed: nothing is trained besides the block.

    Arguments:
        basis: B, (K, T).
        is_periodic: a periodic basis can be rebuilt from its settings and so stays out of
            checkpoints; a random one is saved.
        settings: those of :class:`ProjectionHead`.
    """

    basis: Tensor

    def __init__(self, basis: Tensor, *, is_periodic: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("basis", basis, persistent=not is_periodic)

    def projection(self) -> Tensor:
        return self.basis


class VectorModulatedHead(BasisHead):
    """D = M[:, None] * B with M (K,): LLS-M, equation 5. M starts as given."""

    def __init__(self, basis: Tensor, modulation: Tensor, **settings: Any) -> None:
        super().__init__(basis, **settings)
        self.modulation = nn.Parameter(modulation)

    def projection(self) -> Tensor:
        return self.modulation[:, None] * self.basis

    def projection_backward(self, grad_projection: Tensor) -> None:
        accumulate_grad(self.modulation, (grad_projection * self.basis).sum(dim=1))


class MatrixModulatedHead(BasisHead):
    """D = M^T B with M (R, K), R = K unless reduced: LLS-MxM, equation 6. M starts as given."""

    def __init__(self, basis: Tensor, modulation: Tensor, **settings: Any) -> None:
        super().__init__(basis, **settings)
        self.modulation = nn.Parameter(modulation)

    def projection(self) -> Tensor:
        return self.modulation.T @ self.basis

    def projection_backward(self, grad_projection: Tensor) -> None:
        accumulate_grad(self.modulation, self.basis @ grad_projection.T)


@dataclass(frozen=True, kw_only=True)
class BasisRule(ProjectionRule):
    """Settings that LLS and its variants share.

    Arguments:
        basis: "cosine", "square" (default) or "random".
        setting: "official" (default) or "paper"; see :func:`locallearn.rules.build_basis`.
        normalize: whether latents are scaled to length one; by default they are, except with a
            random basis, as in the authors' code.
    """

    basis: str = "square"
    setting: str = "official"
    normalize: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis(self.basis, self.setting)

    def build_rows(self, num_rows: int, spec: HeadSpec) -> Tensor:
        """B with that many rows, (num_rows, T)."""
        return build_basis(
            self.basis,
            self.setting,
            num_rows,
            spec.latent_length,
            basis_length=spec.basis_length,
            dtype=spec.dtype,
        )

    def head_settings(self) -> dict[str, Any]:
        """The keyword arguments that every head of this family takes."""
        is_periodic = self.basis != "random"
        return super().head_settings() | {
            "is_periodic": is_periodic,
            "normalize": is_periodic if self.normalize is None else self.normalize,
        }


@dataclass(frozen=True, kw_only=True)
class ModulatedRule(BasisRule):
    """Settings that the variants with a trained M share.

    Arguments:
        m_start: "official" (0.01 * N(0, 1), the authors' code) or "identity", at which D = B.
    """

    m_start: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m_start not in M_STARTS:
            raise unknown_name("m_start", self.m_start, M_STARTS)

    def start(self, identity: Tensor) -> Tensor:
        """M as it starts, in the shape and type of the identity."""
        if self.m_start == "identity":
            return identity
        return _MODULATION_SCALE * torch.randn(identity.shape, dtype=identity.dtype)


@register_rule
@dataclass(frozen=True, kw_only=True)
class LLS(BasisRule):
    """Cross-entropy of the latent's cosine similarity with one fixed wave for each class."""

    name: ClassVar[str] = "lls"
    summary: ClassVar[str] = "latents projected on one fixed wave for each class (LLS)"
    trains: ClassVar[str] = "nothing besides the network"

    def build_head(self, spec: HeadSpec) -> BasisHead:
        return BasisHead(self.build_rows(spec.num_classes, spec), **self.head_settings())


@register_rule
@dataclass(frozen=True, kw_only=True)
class LLSS(LLS):
    """LLS with similarity matching on the same latents: our own extension, nothing more to train.

    Images of one class are drawn together in the whole latent, and not only along their wave.
    """

    name: ClassVar[str] = "lls-s"
    summary: ClassVar[str] = "LLS with similarity matching on the same latents (ours)"

    similarity: float = 10.0


@register_rule
@dataclass(frozen=True, kw_only=True)
class LLSM(ModulatedRule):
    """LLS with a trained amplitude M_c for each class's wave (equation 5)."""

    name: ClassVar[str] = "lls-m"
    summary: ClassVar[str] = "LLS with a trained amplitude for each class's wave (LLS-M)"
    trains: ClassVar[str] = "M, K numbers for each block"

    def build_head(self, spec: HeadSpec) -> VectorModulatedHead:
        rows = self.build_rows(spec.num_classes, spec)
        identity = torch.ones(spec.num_classes, dtype=spec.dtype)
        return VectorModulatedHead(rows, self.start(identity), **self.head_settings())


@register_rule
@dataclass(frozen=True, kw_only=True)
class LLSMxM(ModulatedRule):
    """LLS with logits mixed by a trained K x K matrix M (equation 6)."""

    name: ClassVar[str] = "lls-mxm"
    summary: ClassVar[str] = "LLS with trained mixtures of the waves (LLS-MxM)"
    trains: ClassVar[str] = "M, K x K numbers for each block"

    def build_head(self, spec: HeadSpec) -> MatrixModulatedHead:
        rows = self.build_rows(spec.num_classes, spec)
        identity = torch.eye(spec.num_classes, dtype=spec.dtype)
        return MatrixModulatedHead(rows, self.start(identity), **self.head_settings())


@register_rule
@dataclass(frozen=True, kw_only=True)
class LLSMxMReduced(ModulatedRule):
    """LLS-MxM over R waves, however many classes there are.

    Arguments:
        num_waves: R (20 in the authors' SmallConv and MobileNet, 100 in their VGG8).
    """

    name: ClassVar[str] = "lls-mxm-reduced"
    summary: ClassVar[str] = "LLS-MxM over a fixed number of waves R, for many classes"
    trains: ClassVar[str] = "M, R x K numbers for each block (R = 20 unless set)"

    num_waves: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_waves < 1:
            raise UserError(f"num_waves must be at least 1, got {self.num_waves}.")
        if self.m_start == "identity":
            raise UserError(
                "m_start 'identity' gives each class a wave of its own, which lls-mxm-reduced does "
                "not have; use lls-mxm, or m_start 'official'."
            )

    def build_head(self, spec: HeadSpec) -> MatrixModulatedHead:
        rows = self.build_rows(self.num_waves, spec)
        identity = torch.eye(self.num_waves, spec.num_classes, dtype=spec.dtype)
        return MatrixModulatedHead(rows, self.start(identity), **self.head_settings())
