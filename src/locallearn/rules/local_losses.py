"""Local Losses: a trained classifier, a similarity match, or both, for each block.

Shapes: N batch, C channels, F features, T latent length, K classes.

Source: Nokland and Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.errors import UserError, unknown_name
from locallearn.kernels import label_similarity, pool_latents
from locallearn.rules.base import (
    HeadSpec,
    LocalHead,
    ProjectionHead,
    ProjectionRule,
    accumulate_grad,
    register_rule,
)
from locallearn.rules.bases import build_basis

LOCAL_LOSSES = ("pred", "sim", "predsim")
_SIM_SHARE = 0.99  # of the similarity match in predsim
_NORM_EPS = 1e-8
# Under the square root of a variance, whose derivative at zero would be infinite.
_VARIANCE_EPS = 1e-12


class ClassifierHead(ProjectionHead):
    """pred: D = W, trained, (K, T)."""

    def __init__(self, weight: Tensor, **settings: float) -> None:
        super().__init__(normalize=False, **settings)
        self.weight = nn.Parameter(weight)

    def projection(self) -> Tensor:
        return self.weight

    def projection_backward(self, grad_projection: Tensor) -> None:
        accumulate_grad(self.weight, grad_projection)


class SimilarityHead(LocalHead):
    """sim, and predsim with a classifier of the pooled output beside it.

        S = similarities of std(V(h)) over the positions     V: a 3x3 convolution C -> C, trained
        S = similarities of V(h) for a linear block          V: a linear layer F -> F, trained
        loss = mean((S - Y)^2),    predsim: 0.99 of it and 0.01 of pred's cross-entropy

    Arguments:
        spec: of the block.
        classifier: pred's head, for predsim; None for sim.
    """

    def __init__(self, spec: HeadSpec, classifier: ClassifierHead | None) -> None:
        super().__init__()
        width = spec.num_channels
        assert width is not None, "the loss reads the block's whole output"
        self.features: nn.Module = (
            nn.Linear(width, width, bias=False, dtype=spec.dtype)
            if spec.is_linear
            else nn.Conv2d(width, width, 3, padding=1, bias=False, dtype=spec.dtype)
        )
        self.classifier = classifier
        self.latent_size = spec.latent_size
        self.num_classes = spec.num_classes

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        seen = self.features(features)
        if seen.ndim == 4:
            seen = seen.flatten(2)
            # Of a single position there is no deviation.
            several = seen.shape[2] > 1
            seen = (seen.var(dim=2) + _VARIANCE_EPS).sqrt() if several else seen[:, :, 0]
        centred = seen - seen.mean(dim=1, keepdim=True)
        q = centred / (centred.norm(dim=1, keepdim=True) + _NORM_EPS)
        target = label_similarity(labels, self.num_classes, q.dtype)
        loss = F.mse_loss(q @ q.T, target)
        if self.classifier is None:
            return loss, None
        latents = pool_latents(features, self.latent_size)
        head = self.classifier
        logits = latents @ head.projection().T / head.temperature
        entropy = F.cross_entropy(logits, labels, label_smoothing=head.label_smoothing)
        return _SIM_SHARE * loss + (1 - _SIM_SHARE) * entropy, logits


@register_rule
@dataclass(frozen=True, kw_only=True)
class LocalLosses(ProjectionRule):
    """A layer of its own for each block, trained with it.

    "pred" is the cross-entropy of a linear classifier of the latents. Its W starts as the LLS
    authors draw a random basis, 0.1 * N(0, 1), here at length T outright. "sim" matches the
    similarities of the whole output to those of the labels; "predsim" is both.

    Arguments:
        local_loss: "pred", "sim" or "predsim".
    """

    name: ClassVar[str] = "local-losses"
    summary: ClassVar[str] = "a trained classifier (pred), similarity match (sim) or both (predsim)"
    trains: ClassVar[str] = "W, K x T numbers for each block; sim: 9 C x C, or F x F"

    local_loss: str = "pred"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_loss not in LOCAL_LOSSES:
            raise unknown_name("local_loss", self.local_loss, LOCAL_LOSSES)
        if self.local_loss == "sim" and self.temperature != ProjectionRule.temperature:
            raise UserError("temperature divides logits, and local_loss 'sim' has none.")
        if self.similarity and self.local_loss != "pred":
            raise UserError(
                f"similarity is a term beside local_loss 'pred'; {self.local_loss!r} is a "
                f"similarity match itself."
            )

    def build_head(self, spec: HeadSpec) -> LocalHead:
        if self.local_loss == "sim":
            return SimilarityHead(spec, None)
        weight = build_basis(
            "random", "official", spec.num_classes, spec.latent_length, dtype=spec.dtype
        )
        classifier = ClassifierHead(weight, **self.head_settings())
        return SimilarityHead(spec, classifier) if self.local_loss == "predsim" else classifier
