"""What only a CUDA device can show: the same results there, and steps that never wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from locallearn import LocalLearner, build_model, list_rules
from locallearn.cli.console import QuietObserver
from locallearn.data import Augmentation, ImageLoader, load_dataset
from locallearn.engine import Interrupted, TrainConfig, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("rule", list_rules())
def test_steps_equal_those_on_the_cpu_in_float64(rule: str) -> None:
    images = torch.randn(16, 3, 17, 17, dtype=torch.float64)
    labels = torch.randint(10, (16,))
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = build_model("smallconv").double().to(device)
        learner = LocalLearner(model, rule, num_classes=10)
        for _ in range(20):
            result = learner.step(images.to(device), labels.to(device))
        losses.append(torch.stack([result.loss, *result.block_losses.values()]).cpu())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", list_rules())
def test_a_step_does_not_synchronise(rule: str, precision: str) -> None:
    learner = LocalLearner(build_model("smallconv").cuda(), rule, precision=precision)
    images = torch.randn(16, 3, 16, 16, device="cuda")
    labels = torch.randint(10, (16,), device="cuda")
    learner.step(images, labels)  # libraries may wait while they load
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_equal_those_on_the_cpu() -> None:
    data = load_dataset("digits")
    recipe = Augmentation(pad=1, random_crop=True, flip=True, erase_probability=0.3)
    epochs = []
    for device in ("cpu", "cuda"):
        loader = ImageLoader(
            data.train,
            data.inputs,
            batch_size=100,
            device=torch.device(device),
            augmentation=recipe,
            shuffle=True,
        )
        epochs.append([(x.cpu(), y.cpu()) for x, y in loader.epoch(3)])
    for (x, y), (x2, y2) in zip(*epochs, strict=True):
        torch.testing.assert_close(x, x2)
        assert torch.equal(y, y2)


def test_a_run_is_stopped_and_resumed(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, device="cuda", dropout=0.1)
    trainer = Trainer.start(config, tmp_path / "run", QuietObserver())
    trainer.stop_signal = 15
    with pytest.raises(Interrupted):
        trainer.fit()
    summary = Trainer.resume(tmp_path / "run", QuietObserver()).fit()
    assert summary["device"] == "cuda"
    assert summary["test_acc"] > 80
