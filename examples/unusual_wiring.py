"""A network that is no chain: two inputs, two branches, and a U with skip connections.

Its forward takes a digit's image and, apart from it, the sums of its rows and columns. The image
goes down and up again, with what was seen on the way down joined in on the way up; the sums go
through a branch of their own. Nothing of that has to be told: between blocks the learner lets
tensors flow as the model's own forward sends them. Blocks are what repeats, `Stage`, and the chains
of linear layers in the branch. Ten epochs by each rule, half a minute on one CPU core: LLS-S
reached 93.9 % here, and backpropagation 98.6 %.

    python examples/unusual_wiring.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner


class Stage(nn.Module):
    """Two convolutions, and the sum of what they say."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.far = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.near(x) + self.far(x)))


class UNet(nn.Module):
    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [Stage(1, width), Stage(width, 2 * width), Stage(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([Stage(6 * width, 2 * width), Stage(3 * width, width)])
        self.sums = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        )
        self.classifier = nn.Linear(width + 32, num_classes)

    def forward(self, images: Tensor, sums: Tensor) -> Tensor:
        x, seen = images, []
        for stage in self.down:
            x = stage(x)
            seen.append(x)
            x = F.max_pool2d(x, 2)
        x = seen.pop()  # the deepest stage has nothing below it
        for stage in self.up:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), seen.pop()], dim=1))
        return self.classifier(torch.cat([x.mean(dim=(2, 3)), self.sums(sums)], dim=1))


def load() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of (image, sums of rows and columns, digit)."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    sums = torch.cat([images.sum(2), images.sum(3)], dim=2).flatten(1) / 4
    labels = torch.tensor(digits)
    seen, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    return (
        TensorDataset(images[seen], sums[seen], labels[seen]),
        TensorDataset(images[held_out], sums[held_out], labels[held_out]),
    )


def train(rule: str, *, epochs: int) -> float:
    """Test accuracy, percent."""
    torch.manual_seed(0)
    train_set, test_set = load()
    learner = LocalLearner(UNet(), rule, num_classes=10)
    for _ in range(epochs):
        for images, sums, labels in DataLoader(train_set, 64, shuffle=True, drop_last=True):
            learner.step((images, sums), labels)  # the model's arguments, as a tuple
    if learner.block_names:
        print(f"blocks: {', '.join(learner.block_names)}")
    images, sums, labels = test_set.tensors
    return 100 * (learner((images, sums)).argmax(dim=1) == labels).float().mean().item()


def main(epochs: int = 10) -> None:
    for rule in ("lls-s", "bp"):
        print(f"{rule}: test accuracy {train(rule, epochs=epochs):.1f} %")


if __name__ == "__main__":
    main()
