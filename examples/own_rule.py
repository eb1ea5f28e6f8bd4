"""A learning rule of one's own: supervised contrast of a block's latents.

Every block draws the latents of a class together and pushes those of other classes away (Khosla et
al., "Supervised Contrastive Learning", NeurIPS 2020). The rule is a loss of the pooled latents and the
labels, and no more: blocks that allow it are updated in closed form as under any rule of the
package, and the rule has a name that `LocalLearner` knows. It stands here beside LLS and
backpropagation: about half a minute on two CPU cores.

    python examples/own_rule.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner, build_model
from locallearn.rules import HeadSpec, LatentHead, LatentRule, register_rule


class ContrastHead(LatentHead):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def loss(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        q = F.normalize(latents, dim=1)  # (N, T)
        itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
        similarities = (q @ q.T / self.temperature).masked_fill(itself, float("-inf"))
        log_p = F.log_softmax(similarities, dim=1).masked_fill(itself, 0.0)
        alike = (labels[:, None] == labels) & ~itself
        return -((log_p * alike).sum(1) / alike.sum(1).clamp(min=1)).mean(), None


@register_rule
@dataclass(frozen=True, kw_only=True)
class Contrast(LatentRule):
    name: ClassVar[str] = "contrast"
    summary: ClassVar[str] = "supervised contrast of the latents of a batch"
    trains: ClassVar[str] = "nothing besides the network"

    temperature: float = 0.1

    def build_head(self, spec: HeadSpec) -> LatentHead:
        return ContrastHead(self.temperature)


def train(rule: str, *, epochs: int) -> float:
    """Test accuracy, percent."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    seen, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    loader = DataLoader(
        TensorDataset(images[seen], labels[seen]), batch_size=128, shuffle=True, drop_last=True
    )
    model = build_model("smallconv", num_classes=10, in_channels=1)
    learner = LocalLearner(model, rule, num_classes=10)
    for _ in range(epochs):
        for batch_images, batch_labels in loader:
            learner.step(batch_images, batch_labels)
    correct = learner(images[held_out]).argmax(dim=1) == labels[held_out]
    return 100 * correct.float().mean().item()


def main(epochs: int = 10) -> None:
    for rule in ("contrast", "lls", "bp"):
        print(f"{rule}: test accuracy {train(rule, epochs=epochs):.1f} %")


if __name__ == "__main__":
    main()
