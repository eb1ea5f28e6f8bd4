"""What only a CUDA device can show: the same results there, and steps that never wait for it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from locallearn import LocalLearner, build_model, list_rules
from locallearn.cli.console import QuietObserver
from locallearn.data import Augmentation, ImageLoader, load_dataset
from locallearn.engine import Interrupted, TrainConfig, Trainer
from locallearn.engine.graphs import GraphedStep
from locallearn.engine.measuring import peak_memory_bytes

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
    trainer.request_stop(15)
    with pytest.raises(Interrupted):
        trainer.fit()
    summary = Trainer.resume(tmp_path / "run", QuietObserver()).fit()
    assert summary["device"] == "cuda"
    assert summary["test_acc"] > 80


def losses_of(learner: LocalLearner, step, num_steps: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(num_steps):
        images = torch.randn(16, 3, 16, 16, generator=generator).cuda()
        labels = torch.randint(10, (16,), generator=generator).cuda()
        result = step(images, labels)
        rows.append(torch.stack([result.loss, *result.block_losses.values()]).clone())
    return torch.stack(rows).cpu()


def fresh(rule: str, model: str = "smallconv", **settings) -> LocalLearner:
    torch.manual_seed(1)
    return LocalLearner(build_model(model).cuda(), rule, recalibration_batches=0, **settings)


@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
@pytest.mark.parametrize("rule", ["lls", "lls-m", "lls-mxm", "lls-s", "local-losses"])
def test_triton_is_the_choice_and_its_steps_are_the_references(model: str, rule: str) -> None:
    """In float32, one step of plain SGD: no further from float64 than twice autograd's own."""
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    assert fresh(rule, model).backend == "triton"
    images = torch.randn(16, 3, 32, 32).cuda()
    labels = torch.randint(10, (16,)).cuda()
    moved = {}
    for backend in ("reference", "autograd", "triton"):
        learner = fresh(rule, model, backend=backend, **sgd)
        if backend == "reference":
            torch.manual_seed(1)
            network = build_model(model).cuda().double()
            learner = LocalLearner(network, rule, backend=backend, **sgd)
            for head, single in zip(learner.heads, fresh(rule, model, **sgd).heads, strict=True):
                head.load_state_dict(single.state_dict())
        before = [p.detach().double().clone() for p in learner.parameters()]
        learner.step(images.to(next(learner.parameters()).dtype), labels)
        after = learner.parameters()
        moved[backend] = [b - p.detach().double() for b, p in zip(before, after, strict=True)]
    for exact, plain, ours in zip(*moved.values(), strict=True):
        floor = 1e-5 * exact.abs().max() + 1e-8
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
@pytest.mark.parametrize("rule", ["bp", "lls", "lls-mxm", "lls-s", "dfa", "drtp"])
def test_a_graphed_step_is_the_plain_one(
    rule: str, model: str, precision: str, overlap: bool
) -> None:
    """With an evaluation between, after which replays must train at the training point again."""
    plain = fresh(rule, model, precision=precision)
    graphed = fresh(rule, model, precision=precision, overlap_updates=overlap)
    step = GraphedStep(graphed)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.1, "atol": 0.05}
    for _ in range(3):
        expected = losses_of(plain, plain.step, 6)
        torch.testing.assert_close(losses_of(graphed, step, 6), expected, **tolerance)
        plain.eval()
        graphed.eval()
        for p, q in zip(graphed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)


def test_a_graph_is_made_anew_for_a_loaded_state_and_reads_a_changed_rate() -> None:
    learner = fresh("lls")
    step, plain = GraphedStep(learner), fresh("lls")
    losses_of(learner, step, 6)
    state = copy.deepcopy(learner.training_state())
    for each in (learner, plain):
        each.load_training_state(state)
        for optimizer in each.optimizers.values():
            optimizer.param_groups[0]["lr"] = 1e-4
    expected = losses_of(plain, plain.step, 8)
    torch.testing.assert_close(losses_of(learner, step, 8), expected, rtol=1e-3, atol=1e-4)


def test_a_graph_takes_other_shapes_as_ordinary_steps() -> None:
    learner = fresh("lls")
    step = GraphedStep(learner)
    for num in (16, 16, 16, 16, 16, 7, 16):
        images, labels = torch.randn(num, 3, 16, 16).cuda(), torch.randint(10, (num,)).cuda()
        assert step(images, labels).logits.shape == (num, 10)


def test_peak_memory_of_the_closed_form_stays_under_backpropagations() -> None:
    images = torch.randn(128, 3, 32, 32).cuda().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,)).cuda()
    peaks = {}
    for rule in ("bp", "lls"):
        learner = fresh(rule, "vgg8")
        learner.step(images, labels)
        peaks[rule] = peak_memory_bytes(lambda step=learner.step: step(images, labels), "cuda")
    assert peaks["lls"] <= 0.5 * peaks["bp"]


def test_a_run_is_captured_in_a_graph(tmp_path: Path) -> None:
    summary = Trainer.start(TrainConfig(epochs=2, device="cuda"), tmp_path, QuietObserver()).fit()
    assert summary["cuda_graph"]
    assert summary["backend"] == "triton"
