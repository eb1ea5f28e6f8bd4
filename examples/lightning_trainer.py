"""Local learning in Lightning's Trainer.

`LocalLightningModule` makes a LightningModule of a network and a rule: the blocks learn inside the
forward, and the Trainer has its epochs, validation, callbacks and checkpoints as ever. Ten epochs
of the digits by LLS-S, a quarter of a minute on one CPU core, reached 96.4 % here. Needs
`pip install 'locallearn[lightning]'`.

    python examples/lightning_trainer.py
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from locallearn.integrations import LocalLightningModule


def block(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def load() -> tuple[DataLoader, DataLoader]:
    """Training and validation batches."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    seen, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    return (
        DataLoader(TensorDataset(images[seen], labels[seen]), 64, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[held_out], labels[held_out]), 360),
    )


def main(epochs: int = 10) -> float:
    """Validation accuracy, percent."""
    lightning.seed_everything(0)
    train_batches, validation_batches = load()
    model = nn.Sequential(
        block(1, 32),
        block(32, 64),
        nn.MaxPool2d(2),
        block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    images, _ = next(iter(validation_batches))
    # From an example input the blocks are found, whose optimizers the Trainer asks for at once.
    module = LocalLightningModule(model, "lls-s", num_classes=10, example_input=images[:2])
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, train_batches, validation_batches)
    accuracy = 100 * trainer.callback_metrics["val_acc"].item()
    print(f"validation accuracy {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
