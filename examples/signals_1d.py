"""One-dimensional convolutions: which waveform lies in the noise?

Sine, square, sawtooth and triangle waves of any frequency and phase, under noise nearly as strong
as they are. The network is one flat nn.Sequential, with no module for a block: the learner makes a
block of each chain Conv1d, BatchNorm1d, ReLU. 300 steps by each rule, less than a minute on one CPU
core: LLS-M reached 89.5 % here, and backpropagation 92.8 %.

    python examples/signals_1d.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from locallearn import LocalLearner

LENGTH = 128
WAVES = {
    "sine": lambda turns: torch.sin(2 * math.pi * turns),
    "square": lambda turns: torch.sign(torch.sin(2 * math.pi * turns)),
    "sawtooth": lambda turns: 2 * (turns % 1) - 1,
    "triangle": lambda turns: 4 * (turns % 1 - 0.5).abs() - 1,
}


def make_signals(number: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Signals (number, 1, LENGTH) and which wave each holds (number,)."""
    labels = torch.randint(len(WAVES), (number,))
    frequencies = torch.empty(number, 1).uniform_(2, 6)  # turns in a signal
    phases = torch.rand(number, 1)
    turns = frequencies * torch.linspace(0, 1, LENGTH) + phases
    waves = torch.stack([wave(turns) for wave in WAVES.values()])
    signals = waves[labels, torch.arange(number)]
    return (signals + noise * torch.randn_like(signals)).unsqueeze(1), labels


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 32, kernel_size=9, padding=4),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, kernel_size=9, padding=4),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(64, 64, kernel_size=9, padding=4),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, len(WAVES)),
    )


def train(rule: str, *, steps: int) -> float:
    """Accuracy on fresh signals, percent."""
    torch.manual_seed(0)
    learner = LocalLearner(build_model(), rule, num_classes=len(WAVES))
    for _ in range(steps):
        learner.step(*make_signals(128))
    if learner.block_names:
        print(f"blocks: {', '.join(learner.block_names)}")
    signals, labels = make_signals(2000)
    return 100 * (learner(signals).argmax(dim=1) == labels).float().mean().item()


def main(steps: int = 300) -> None:
    for rule in ("lls-m", "bp"):
        print(f"{rule}: accuracy {train(rule, steps=steps):.1f} %")


if __name__ == "__main__":
    main()
