"""A learning rule of one's own: class means in place of waves.

LLS compares a block's latents with one fixed wave for each class. This rule compares them with the
mean of the latents that the class has had so far, as nearest-mean classifiers do; nothing is
trained besides the network. A rule is a loss of the pooled latents and the labels, and a name:
blocks that allow it are updated in closed form as under any rule of the package. Ten epochs of the
digits by each rule, a quarter of a minute on one CPU core: it reached 98.3 % here, LLS 99.2 % and
backpropagation 99.4 %.

    python examples/own_rule.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner, build_model
from locallearn.rules import HeadSpec, LatentHead, LatentRule, register_rule


class ClassMeansHead(LatentHead):
    def __init__(self, spec: HeadSpec, memory: float, temperature: float) -> None:
        super().__init__()
        means = 0.01 * torch.randn(spec.num_classes, spec.latent_length, dtype=spec.dtype)
        self.register_buffer("means", means)
        self.memory = memory
        self.temperature = temperature

    def loss(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(latents, dim=1)  # (N, T)
        with torch.no_grad():
            members = F.one_hot(labels, len(self.means)).to(q.dtype)  # (N, K)
            counts = members.sum(dim=0).unsqueeze(1)  # (K, 1)
            batch_means = members.T @ q / counts.clamp(min=1)
            forgetting = (1 - self.memory) * (counts > 0)
            self.means.lerp_(batch_means, forgetting)
        logits = q @ F.normalize(self.means, dim=1).T / self.temperature
        return F.cross_entropy(logits, labels), logits


@register_rule
@dataclass(frozen=True, kw_only=True)
class ClassMeans(LatentRule):
    name = "class-means"
    summary = "cosine similarity with the mean of each class's latents"
    trains = "nothing besides the network"

    memory: float = 0.9
    temperature: float = 0.1

    def build_head(self, spec: HeadSpec) -> LatentHead:
        return ClassMeansHead(spec, self.memory, self.temperature)


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
    for rule in ("class-means", "lls", "bp"):
        print(f"{rule}: test accuracy {train(rule, epochs=epochs):.1f} %")


if __name__ == "__main__":
    main()
