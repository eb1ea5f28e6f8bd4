"""The network that PEPITA's paper trains on MNIST, one hidden convolution, under several rules.

    python benchmarks/one_hidden_layer.py --data-dir DIR

One convolution of 32 channels (3x3, where the paper's has 5x5), no BatchNorm, max-pool, and the
output layer on its 6,272 features; 6 epochs, batch 64, no augmentation, seed 0. Prints each rule's
test accuracy after every epoch. `pepita` at a feedback scale of 1e-9 holds the convolution still:
only the output layer learns.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from locallearn import LocalLearner, build_rule
from locallearn.data import ImageLoader, load_dataset
from locallearn.models import BlockNetwork, BlockStyle, ConvBlock

_EPOCHS = 6
# Rule, its options, activation, optimizer, learning rate.
_RUNS: list[tuple[str, dict[str, Any], str, str, float]] = [
    ("pepita", {}, "relu", "sgd", 0.01),
    ("pepita", {"feedback_scale": 1e-9}, "relu", "sgd", 0.01),
    ("dfa", {}, "relu", "schedulefree-adamw", 0.001),
    ("drtp", {}, "tanh", "schedulefree-adamw", 0.001),
    ("bp", {}, "relu", "sgd", 0.01),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    data = load_dataset("mnist", data_dir=parser.parse_args().data_dir, augment="none")
    cpu = torch.device("cpu")
    train = ImageLoader(data.train, data.inputs, batch_size=64, device=cpu, shuffle=True)
    test = ImageLoader(data.test, data.inputs, batch_size=500, device=cpu)
    for rule, options, activation, optimizer, lr in _RUNS:
        torch.manual_seed(0)
        block = ConvBlock(
            1, 32, latent_size=4, max_pool=2, style=BlockStyle(activation, norm="none")
        )
        model = BlockNetwork([block], pool_size=14, num_classes=10)
        learner = LocalLearner(
            model,
            build_rule(rule, **options),
            optimizer=optimizer,
            lr=lr,
            backend="autograd",
        )
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(each, _EPOCHS)
            for each in learner.optimizers.values()
            if optimizer == "sgd"
        ]
        accuracies = []
        for epoch in range(_EPOCHS):
            for images, labels in train.epoch(epoch):
                learner.step(images, labels)
            for schedule in schedules:
                schedule.step()
            right = sum((learner(x).argmax(1) == y).sum().item() for x, y in test.epoch())
            accuracies.append(round(100 * right / len(data.test), 2))
        print(rule, options, activation, accuracies, flush=True)


if __name__ == "__main__":
    main()
