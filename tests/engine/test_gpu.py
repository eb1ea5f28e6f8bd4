"""What only a CUDA device can show: the same results there, and steps that never wait for it."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch

from locallearn import LocalLearner, build_model, list_rules
from locallearn.cli.console import QuietObserver
from locallearn.data import Augmentation, ImageLoader, load_dataset
from locallearn.engine import Interrupted, TrainConfig, Trainer
from locallearn.engine.benchmark import BenchmarkConfig, run_benchmark, same_weights
from locallearn.engine.building import resident_inputs
from locallearn.engine.graphs import GraphedStep
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.engine.op_benchmark import TORCH, time_ops
from locallearn.kernels import GPU_BACKENDS, missing_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

# With a device, "cuda" lacks at most its packages or a newer device, which the reason names.
_MISSING = {name: missing_for(name, "cuda") for name in GPU_BACKENDS}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name} {why}"))
    for name, why in _MISSING.items()
]
NEEDS_BOTH = pytest.mark.skipif(
    any(_MISSING.values()),
    reason="; ".join(f"{name} {why}" for name, why in _MISSING.items() if why),
)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", list_rules())
def test_a_step_does_not_synchronise(rule: str, precision: str, backend: str) -> None:
    network = build_model("smallconv").cuda()
    learner = LocalLearner(network, rule, precision=precision, backend=backend)
    images = torch.randn(16, 3, 16, 16, device="cuda")
    labels = torch.randint(10, (16,), device="cuda")
    learner.step(images, labels)  # libraries may wait while they load
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_batches_equal_those_on_the_cpu(backend: str) -> None:
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
            backend=backend if device == "cuda" else "reference",
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


def test_triton_is_a_learner_s_own_choice() -> None:
    """Unmeasured: which is the faster, a run finds out."""
    assert fresh("lls").backend == "triton"


@pytest.mark.parametrize("ours", BACKENDS)
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
@pytest.mark.parametrize("rule", ["lls", "lls-m", "lls-mxm", "lls-s", "local-losses"])
def test_steps_are_the_references(model: str, rule: str, ours: str) -> None:
    """In float32, one step of plain SGD: no further from float64 than twice autograd's own."""
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    images = torch.randn(16, 3, 32, 32).cuda()
    labels = torch.randint(10, (16,)).cuda()
    moved = {}
    for backend in ("reference", "autograd", ours):
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
    for exact, plain, found in zip(*moved.values(), strict=True):
        floor = 1e-5 * exact.abs().max() + 1e-8
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
@pytest.mark.parametrize("rule", ["bp", "lls", "lls-mxm", "lls-s", "dfa", "drtp"])
def test_a_graphed_step_is_the_plain_one(
    rule: str, model: str, precision: str, overlap: bool, backend: str
) -> None:
    """With an evaluation between, after which replays must train at the training point again."""
    plain = fresh(rule, model, precision=precision, backend=backend)
    graphed = fresh(rule, model, precision=precision, backend=backend, overlap_updates=overlap)
    step = GraphedStep(graphed)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.1, "atol": 0.05}
    for _ in range(3):
        expected = losses_of(plain, plain.step, 6)
        torch.testing.assert_close(losses_of(graphed, step, 6), expected, **tolerance)
        plain.eval()
        graphed.eval()
        for p, q in zip(graphed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)


def weights_after_graphed_steps(
    backend: str, precision: str, overlap: bool, num_steps: int
) -> dict[str, torch.Tensor]:
    """Of SmallConv, whose captured step makes its batch too: every op is the backend's."""
    data = load_dataset("digits")
    loader = ImageLoader(
        data.train,
        data.inputs,
        batch_size=32,
        device=torch.device("cuda"),
        augmentation=Augmentation(pad=1, random_crop=True, flip=True),
        shuffle=True,
        backend=backend,
    )
    torch.manual_seed(1)
    learner = LocalLearner(
        build_model("smallconv", in_channels=1).cuda(),
        "lls-mxm",
        recalibration_batches=0,
        precision=precision,
        backend=backend,
        overlap_updates=overlap,
    )
    assert set(learner.block_paths.values()) == {"closed form"}
    step = GraphedStep(learner, lambda c, y: (loader.images(c), y), resident_inputs(loader))
    batches = loader.crops()
    for _ in range(num_steps):
        step(*next(batches))
    return {name: p.detach().double() for name, p in learner.named_parameters()}


def weights_after_plain_steps(precision: str | None, num_steps: int) -> dict[str, torch.Tensor]:
    """Of the same on the generic path; in float64 where ``precision`` is None."""
    data = load_dataset("digits")
    loader = ImageLoader(
        data.train,
        data.inputs,
        batch_size=32,
        device=torch.device("cuda"),
        augmentation=Augmentation(pad=1, random_crop=True, flip=True),
        shuffle=True,
    )
    settings = {"recalibration_batches": 0, "backend": "autograd"}
    torch.manual_seed(1)
    network = build_model("smallconv", in_channels=1).cuda()
    learner = LocalLearner(network, "lls-mxm", precision=precision or "fp32", **settings)
    if precision is None:
        single = learner
        learner = LocalLearner(copy.deepcopy(network).double(), "lls-mxm", **settings)
        for head, twin in zip(learner.heads, single.heads, strict=True):
            head.load_state_dict(twin.state_dict())
    for images, labels in itertools.islice(loader.epoch(), num_steps):
        learner.step(images.double() if precision is None else images, labels)
    return {name: p.detach().double() for name, p in learner.named_parameters()}


@NEEDS_BOTH
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_step_of_cuda_is_that_of_triton(precision: str, overlap: bool) -> None:
    """Weights after eight steps, the last five of them replays: no further from each other than
    twice what autograd in this precision is from float64. Adam divides gradients by their size, so
    one near zero may move a weight either way: the floor is a share of the whole tensor's norm."""
    num_steps = 8
    exact = weights_after_plain_steps(None, num_steps)
    plain = weights_after_plain_steps(precision, num_steps)
    triton, cuda = (
        weights_after_graphed_steps(backend, precision, overlap, num_steps)
        for backend in ("triton", "cuda")
    )
    share = {"fp32": 1e-3, "bf16": 2e-2}[precision]
    for name, weights in exact.items():
        limit = 2 * (plain[name] - weights).norm() + share * weights.norm()
        assert (cuda[name] - triton[name]).norm() <= limit, name
        assert (cuda[name] - weights).norm() <= limit, name
        assert (triton[name] - weights).norm() <= limit, name


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
    assert summary["backend"] in GPU_BACKENDS


@NEEDS_BOTH
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_run_measures_both_backends_and_says_what_it_found(
    tmp_path: Path, cuda_graph: bool
) -> None:
    config = TrainConfig(epochs=1, device="cuda", cuda_graph=cuda_graph)
    trainer = Trainer.start(config, tmp_path / "run", QuietObserver())
    reason = trainer.run.read_config().data["backend_reason"]
    number = r"\d+\.\d\d"
    found = re.fullmatch(rf"auto: (\w+) {number} ms a step, (\w+) {number}", reason)
    assert found is not None, reason
    assert set(found.groups()) == set(GPU_BACKENDS)
    assert trainer.learner.backend == trainer.settings.backend == found[1]


@NEEDS_BOTH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_compares_both_backends(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = BenchmarkConfig(
        model="smallconv",
        rules=("lls", "lls-mxm"),
        batch_size=32,
        image_shape=(3, 32, 32),
        num_classes=10,
        precision=precision,
        device="cuda",
        backends=GPU_BACKENDS,
        num_rounds=2,
    )
    result = run_benchmark(config, same_weights(lambda: build_model("smallconv")))
    assert result.gate.is_green, result.gate.errors
    closed = {(r["rule"], r["path"], r["backend"]) for r in result.rows if r["rule"] != "bp"}
    for path in ("closed form", "closed form, graph", "closed form, graph, overlapped"):
        assert {("lls", path, name) for name in GPU_BACKENDS} <= closed
    _, times = time_ops(
        build_model("smallconv"),
        image_shape=(3, 32, 32),
        batch_size=32,
        num_classes=10,
        backends=GPU_BACKENDS,
        precision=precision,
        device=torch.device("cuda"),
        num_rounds=1,
    )
    assert {each.backend for each in times} == {*GPU_BACKENDS, TORCH}
    assert all(each.time_ms > 0 for each in times)
