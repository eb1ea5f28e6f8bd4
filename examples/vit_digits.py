"""A small vision transformer on handwritten digits.

The network is written by hand: patches of 2x2 pixels, a class token, position embeddings, six
encoder layers of PyTorch. The learner finds the six layers, whose outputs are tokens (N, L, C) and
are pooled along the sequence for the local head. The class token and the position embeddings are
parameters of no block; they learn together with the first layer, which reads them. Fifteen epochs
by each rule, a bit more than a minute on one CPU core: LLS-S reached 91.4 % here, and
backpropagation 95.0 %.

    python examples/vit_digits.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (N, 16, width)
        class_tokens = self.class_token.expand(len(images), -1, -1)
        x = torch.cat([class_tokens, tokens], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


def train(rule: str, *, epochs: int) -> float:
    """Test accuracy, percent."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    seen, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    loader = DataLoader(
        TensorDataset(images[seen], labels[seen]), batch_size=64, shuffle=True, drop_last=True
    )
    learner = LocalLearner(VisionTransformer(), rule, num_classes=10, lr=2e-3)
    for _ in range(epochs):
        for batch_images, batch_labels in loader:
            learner.step(batch_images, batch_labels)
    if learner.block_names:
        print(f"blocks: {', '.join(learner.block_names)}")
    correct = learner(images[held_out]).argmax(dim=1) == labels[held_out]
    return 100 * correct.float().mean().item()


def main(epochs: int = 15) -> None:
    for rule in ("lls-s", "bp"):
        print(f"{rule}: test accuracy {train(rule, epochs=epochs):.1f} %")


if __name__ == "__main__":
    main()
