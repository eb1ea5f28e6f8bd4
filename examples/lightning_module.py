"""Local learning in Lightning's Trainer.

The learner is a part of the LightningModule and makes the steps itself, so optimization is manual. What
it must have to go on exactly, optimizers and heads, travels in Lightning's checkpoints. Needs
`pip install lightning`; about ten seconds on two CPU cores.

    python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner


def block(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class LocalClassifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, example_input: Tensor, num_classes: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner = LocalLearner(
            model, "lls-s", num_classes=num_classes, example_input=example_input
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        result = self.learner.step(*batch)
        self.log("loss", result.loss, prog_bar=True)
        self.log_dict({f"loss/{name}": loss for name, loss in result.block_losses.items()})

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.learner(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> None:
        """None of Lightning's: each block has its own, and steps it in the forward."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["learner"] = self.learner.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.learner.load_training_state(checkpoint["learner"])


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
    example_images, _ = next(iter(validation_batches))
    module = LocalClassifier(model, example_images[:2], num_classes=10)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, train_batches, validation_batches)
    accuracy = 100 * trainer.callback_metrics["accuracy"].item()
    print(f"validation accuracy {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
