"""Local Losses: a trained linear classifier for each block.

Source: Nokland and Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from locallearn.rules.base import (
    LatentSpec,
    ProjectionHead,
    ProjectionRule,
    accumulate_grad,
    register_rule,
)
from locallearn.rules.bases import build_basis


class ClassifierHead(ProjectionHead):
    """D = W, trained, (K, T)."""

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        self.weight = nn.Parameter(weight)

    def projection(self) -> Tensor:
        return self.weight

    def projection_backward(self, grad_projection: Tensor) -> None:
        accumulate_grad(self.weight, grad_projection)


@register_rule
@dataclass(frozen=True, kw_only=True)
class LocalLosses(ProjectionRule):
    """The "pred" loss: cross-entropy of a linear classifier trained on the latents.

    W starts as the LLS authors draw a random basis, 0.1 * N(0, 1), here at length T outright.
    """

    name: ClassVar[str] = "local-losses"
    summary: ClassVar[str] = "a trained linear classifier for each block (Local Losses, pred)"
    trains: ClassVar[str] = "W, K x T numbers for each block"

    def build_head(self, spec: LatentSpec) -> ClassifierHead:
        weight = build_basis(
            "random", "official", spec.num_classes, spec.latent_length, dtype=spec.dtype
        )
        return ClassifierHead(
            weight,
            normalize=False,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
        )
