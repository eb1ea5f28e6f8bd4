"""Fine-tuning: what is loaded, what a run of it writes, and what a cached front saves."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

from locallearn import LocalLearner, UserError
from locallearn.cli.console import QuietObserver
from locallearn.data import InputSpec
from locallearn.engine import Interrupted, TrainConfig, Trainer, load_trained
from locallearn.engine.building import build_learner, evaluation_loader, load_data
from locallearn.engine.evaluation import Evaluation, evaluate
from locallearn.engine.finetuning import find_front, load_start, plan_finetuning, read_source
from locallearn.engine.finetuning.choosing import is_imbalanced, usual_epochs
from locallearn.engine.finetuning.front_cache import _make
from locallearn.models import build_model

COUNTS = {"three": 12, "four": 8, "seven": 7}
DIGITS = {"three": 3, "four": 4, "seven": 7}
GIVEN = {"epochs": 2, "batch_size": 8, "num_threads": 1, "trained_blocks": "conv3,linear1"}


def write_digits(root: Path, counts: dict[str, int], digits: dict[str, int]) -> Path:
    """Class folders of scikit-learn's digits, 8x8 grey PNGs."""
    data = load_digits()
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in np.flatnonzero(data.target == digits[name])[:count]:
            pixels = (data.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits."""
    out = tmp_path_factory.mktemp("source") / "run"
    config = TrainConfig(
        rule="lls-mxm", epochs=1, limit_train=300, limit_test=50, num_threads=1, width=0.25
    )
    Trainer.start(config, out, QuietObserver()).fit()
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("images") / "data", COUNTS, DIGITS)


def tune(source: Path | str, images: Path, out: Path, **given: Any) -> Trainer:
    settings = {**GIVEN, "data_dir": str(images), **given}
    balance = settings.pop("balance", "auto")
    plan = plan_finetuning(read_source(str(source)), settings, balance=balance)
    return Trainer.start(plan.settings, out, QuietObserver(), plan)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_weights(one: Path, two: Path, tolerance: float = 0.0) -> None:
    ours, theirs = weights(one), weights(two)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


# -- what is loaded ------------------------------------------------------------------------------


def test_all_that_fits_is_loaded_and_the_output_layer_is_new(source: Path, images: Path) -> None:
    plan = plan_finetuning(read_source(str(source)), {**GIVEN, "data_dir": str(images)})
    inputs, names = plan.dataset.inputs, plan.dataset.class_names
    learner = build_learner(plan.settings, inputs, 3)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    loaded = load_start(learner, plan.start, plan.settings, inputs, names)
    trained = load_trained(source).learner.model.state_dict()
    assert loaded.new == ("classifier.weight", "classifier.bias")
    assert loaded.new_heads == ("conv3", "linear1")  # M is K x K
    for name, tensor in learner.model.state_dict().items():
        expected = before[name] if name in loaded.new else trained[name]
        assert torch.equal(tensor, expected), name
    kept = [tensor for name, tensor in trained.items() if name not in loaded.new]
    assert loaded.num_loaded == sum(tensor.numel() for tensor in kept)


def test_the_images_are_seen_as_the_source_saw_them(source: Path, tmp_path: Path) -> None:
    colored = tmp_path / "data"
    for name in ("a", "b"):
        (colored / name).mkdir(parents=True)
        for number in range(6):
            shade = 40 * number + (name == "b")
            Image.new("RGB", (20, 14), (shade, 0, 0)).save(colored / name / f"{number}.png")
    plan = plan_finetuning(read_source(str(source)), {**GIVEN, "data_dir": str(colored)})
    saw = load_trained(source).config.inputs
    sees = plan.dataset.inputs
    assert (sees.num_channels, sees.image_size) == (1, (8, 8))
    assert (sees.mean, sees.std) == (saw.mean, saw.std)


def test_of_the_same_classes_output_layer_and_heads_are_loaded(
    source: Path, tmp_path: Path
) -> None:
    names = {str(digit): digit for digit in range(10)}
    same = write_digits(tmp_path / "data", dict.fromkeys(names, 6), names)
    plan = plan_finetuning(read_source(str(source)), {"data_dir": str(same), "epochs": 1})
    learner = build_learner(plan.settings, plan.dataset.inputs, 10)
    loaded = load_start(
        learner, plan.start, plan.settings, plan.dataset.inputs, plan.dataset.class_names
    )
    assert loaded.new == loaded.new_heads == ()
    trained = load_trained(source).learner
    for ours, theirs in zip(learner.heads.parameters(), trained.heads.parameters(), strict=True):
        assert torch.equal(ours, theirs)


VIEW = InputSpec((32, 32), 3, None, (0.5,) * 3, (0.5,) * 3)
RESNET = "torchvision:resnet18"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return build_model(RESNET, num_classes=7).state_dict()


def load_into_resnet(path: Path, num_classes: int = 3) -> tuple[LocalLearner, Any]:
    start = read_source(f"{RESNET}@{path}", image_size=32)
    settings = TrainConfig(**start.settings, trained_blocks="none").resolve()
    learner = build_learner(settings, start.inputs, num_classes)
    names = [f"class {i}" for i in range(num_classes)]
    return learner, load_start(learner, start, settings, start.inputs, names)


@pytest.mark.parametrize("wrapping", ["plain", "safetensors", "state_dict", "module."])
def test_state_dicts_of_packages_are_loaded(
    wrapping: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pth")
    if wrapping == "safetensors":
        save_file(state, path)
    elif wrapping == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif wrapping == "module.":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    learner, loaded = load_into_resnet(path)
    assert loaded.new == ("fc.weight", "fc.bias")
    ours = learner.model.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in state.items() if name not in loaded.new)


def test_what_does_not_fit_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"

    def said(changed: dict[str, Tensor]) -> str:
        torch.save(changed, path)
        with pytest.raises(UserError) as error:
            load_into_resnet(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    lacking = {name: t for name, t in state.items() if name != "layer2.0.conv1.weight"}
    assert "has no tensor 'layer2.0.conv1.weight'" in said(lacking)
    assert "holds 'head.bias', for which" in said(state | {"head.bias": torch.zeros(3)})
    wide = state | {"bn1.weight": torch.ones(65)}
    assert "tensor 'bn1.weight'" in said(wide)
    assert "has shape 65;" in said(wide)
    # Weights of old versions of torch have no counters of batches.
    torch.save({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, path)
    load_into_resnet(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--from is empty"),
        ("nowhere", "there is no such file or directory"),
        ("torchvision:resnet18@", "names no weights behind the @"),
        ("torchvision:resnet18@nothing.pth", "there is no file"),
        ("torchvision:resnet18@IMAGENET1K_V9", "Valid: DEFAULT, IMAGENET1K_V1"),
        ("torchvision:resnt18", "Did you mean 'resnet18'"),
    ],
)
def test_sources_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_source(text)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"no archive")
    with pytest.raises(UserError, match="truncated, or holds more than tensors"):
        read_source(f"{RESNET}@{tmp_path}/w.pth")
    torch.save({"loss": 1.0}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_source(f"{RESNET}@{tmp_path}/w.pth")
    with pytest.raises(UserError, match="holds no run"):
        read_source(str(tmp_path))


def test_fresh_weights_are_said_and_images_seen_as_the_package_does() -> None:
    start = read_source("torchvision:resnet18")
    assert "freshly drawn weights" in start.notes[0]
    assert start.digest is None
    assert start.inputs.image_size == (224, 224)
    assert start.inputs.mean == (0.485, 0.456, 0.406)
    assert read_source("torchvision:resnet18", image_size=64).inputs.image_size == (64, 64)


# -- a run ---------------------------------------------------------------------------------------


def test_a_run_and_what_it_reports(source: Path, images: Path, tmp_path: Path) -> None:
    trainer = tune(source, images, tmp_path / "run")
    summary = trainer.fit()
    config = trainer.config
    # A fifth of each for testing (2, 2, 1), of the rest a fifth (2, 1, 1) for validation.
    parts = {name: Counter(counts) for name, counts in summary["class_counts"].items()}
    assert parts["test"] == {"three": 2, "four": 2, "seven": 1}
    assert parts["val"] == {"three": 2, "four": 1, "seven": 1}
    assert parts["train"] == {"three": 8, "four": 5, "seven": 5}
    assert config.settings.balance == "on"  # 8 of the largest, 5 of the smallest
    accuracies = list(summary["test_class_acc"].values())
    assert summary["test_balanced_acc"] == pytest.approx(sum(accuracies) / 3)
    assert summary["kept_epoch"] == 2
    assert summary["peak_memory_mib"] > 0
    assert summary["start_from"] == str(source)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_balanced_acc"]) == summary["val_balanced_acc"]
    # What is frozen is as it was.
    before, after = weights(source), weights(tmp_path / "run")
    for name in before:
        if name.startswith(("model.conv1", "model.conv2")):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["model.conv3.conv.weight"], after["model.conv3.conv.weight"])
    # The written run is a run like any other.
    trained = load_trained(tmp_path / "run")
    dataset = load_data(trained.config.settings, view=trained.config.inputs)
    result = evaluate(
        trained.learner, evaluation_loader(dataset.test, dataset, 8, torch.device("cpu")), 3
    )
    assert result.accuracy == summary["test_acc"]
    assert result.balanced_accuracy == pytest.approx(summary["test_balanced_acc"])


def test_an_interrupted_run_goes_on_exactly_without_its_source(
    source: Path, images: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "source"
    shutil.copytree(source, gone)
    tune(gone, images, tmp_path / "whole").fit()
    trainer = tune(gone, images, tmp_path / "cut")
    shutil.rmtree(gone)
    for signal, resumed in ((2, None), (2, 1), (0, 1)):
        if resumed:
            trainer = Trainer.resume(tmp_path / "cut", QuietObserver())
        if signal:
            trainer.request_stop(signal)
            with pytest.raises(Interrupted):
                trainer.fit()
        else:
            trainer.fit()
    # Both started from the same weights, in directories of other names.
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_epoch_is_kept_by_validation(source: Path, images: Path, tmp_path: Path) -> None:
    trainer = tune(source, images, tmp_path / "run", keep="best", epochs=4, lr=0.02)
    summary = trainer.fit()
    values = [row["val_balanced_acc"] for row in trainer.rows]
    best = values.index(max(values))
    assert summary["kept_epoch"] == best + 1
    assert summary["test_acc"] == trainer.rows[best]["test_acc"]
    trained = load_trained(tmp_path / "run")
    dataset = load_data(trained.config.settings, view=trained.config.inputs)
    assert dataset.val is not None
    result = evaluate(
        trained.learner, evaluation_loader(dataset.val, dataset, 8, torch.device("cpu")), 3
    )
    assert result.balanced_accuracy == max(values)
    with pytest.raises(UserError, match="--keep best chooses by the validation images"):
        tune(source, images, tmp_path / "none", keep="best", val_split=0.0)


def test_classes_that_are_nearly_balanced_are_left_alone(source: Path, images: Path) -> None:
    assert is_imbalanced([8, 5])
    assert not is_imbalanced([6, 4])
    given = {**GIVEN, "data_dir": str(images)}
    plan = plan_finetuning(read_source(str(source)), given, balance="off")
    assert plan.settings.balance == "off"


def test_epochs_follow_from_the_number_of_images() -> None:
    # 400 steps: of 40 images in batches of 8, five an epoch.
    assert usual_epochs(40, 8) == 80
    assert usual_epochs(41, 8) == 67
    assert usual_epochs(8, 8) == 100
    assert usual_epochs(100_000, 32) == 5


def test_more_than_the_limit_is_an_error(source: Path, images: Path, tmp_path: Path) -> None:
    trainer = tune(source, images, tmp_path / "run")
    trainer.peak.limit_bytes, trainer.peak.limit_text = 1000, "1000B"
    with pytest.raises(UserError, match=r"took .* MiB, measured, which is above .* 1000B"):
        trainer.fit()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_limit_chooses_and_holds(source: Path, images: Path, tmp_path: Path) -> None:
    given = {**GIVEN, "data_dir": str(images), "memory_limit": "600KiB"}
    del given["trained_blocks"], given["batch_size"]
    plan = plan_finetuning(read_source(str(source)), given)
    assert plan.fit is not None
    assert plan.settings.trained_blocks == plan.fit.choice.trained_blocks
    summary = Trainer.start(plan.settings, tmp_path / "run", QuietObserver(), plan).fit()
    assert 0 < summary["peak_memory_mib"] <= summary["memory_limit_mib"] == 600 / 1024
    record = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["finetune"]["fit"]
    assert record["choice"]["batch_size"] == plan.settings.batch_size
    assert record["comparison"]["whole"]["peak_bytes"] > 0


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])
    evaluation = Evaluation(0.0, 75.0, confusion)
    assert evaluation.balanced_accuracy == pytest.approx((80 + 50) / 2)


# -- a cached front ------------------------------------------------------------------------------


def test_cached_and_uncached_runs_yield_the_same_weights(
    source: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    tune(source, images, tmp_path / "plain", augment="none").fit()
    tune(source, images, tmp_path / "cached", feature_cache=cache).fit()
    assert_same_weights(tmp_path / "plain", tmp_path / "cached", tolerance=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setattr(
        "locallearn.engine.finetuning.front_cache._make", lambda *a: pytest.fail("made again")
    )
    # A second run finds it, whatever its seed and learning rate.
    tune(source, images, tmp_path / "again", feature_cache=cache, lr=1e-4, val_split=0.2).fit()
    monkeypatch.setattr("locallearn.engine.finetuning.front_cache._make", _make)
    summary = tune(
        source, images, tmp_path / "small", feature_cache=cache, cache_dtype="bf16"
    ).fit()
    assert summary["epochs"] == 2
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert len(sizes) == 6
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tmp"]


def test_a_cached_run_resumes_exactly(source: Path, images: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    kept = {"feature_cache": cache, "cache_views": 2, "augment": "basic"}
    tune(source, images, tmp_path / "whole", **kept).fit()
    trainer = tune(source, images, tmp_path / "cut", **kept)
    trainer.request_stop(2)
    with pytest.raises(Interrupted):
        trainer.fit()
    shutil.rmtree(cache)
    Trainer.resume(tmp_path / "cut", QuietObserver()).fit()
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    shapes = {np.load(path).shape[:2] for path in Path(cache).iterdir()}
    assert (2, 18) in shapes  # two views of the training images, one of the others


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=16,
        num_classes=3,
    )


def own() -> nn.Module:
    return build_model("smallconv", num_classes=3, width=0.25)


@pytest.mark.parametrize(
    ("build", "trained", "cut"),
    [
        pytest.param(resnet, "layer3.0,layer4.0", "layer3.0", id="two blocks"),
        pytest.param(resnet, "none", "fc", id="the output layer alone"),
        pytest.param(vit, "encoder.layers.encoder_layer_2", None, id="tokens, made in front"),
        pytest.param(own, "conv2,linear1", "conv2", id="a frozen block behind"),
    ],
)
def test_models_go_on_behind_their_front(
    build: Callable[[], nn.Module], trained: str, cut: str | None
) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    kwargs = {"num_classes": 3, "trained_blocks": trained, "example_input": images}
    learner, other = LocalLearner(model, "lls", **kwargs), LocalLearner(twin, "lls", **kwargs)
    # A step on what the front makes is the step on the images.
    learner.step(images, labels)
    front = find_front(other, images)
    assert front.cut_name == (cut or trained)
    made = front.made(images)
    assert made.shape == (4, *front.feature_shape)
    with front.skipped():
        other.step(made, labels)
    for (key, ours), theirs in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6, msg=key)
    assert all(module._compiled_call_impl is None for module in twin.modules())


class Skipping(nn.Module):
    """The last layer reads what the first has made, past the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        return self.last(self.two(first).relu() + first)


class Dropping(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.dropout(self.one(x)).relu()))


class Scaling(Skipping):
    """In front the forward itself computes, which does not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two((self.one(x / 2) * 3).relu()))


def test_fronts_that_cannot_be_passed_over_are_refused() -> None:
    images = torch.randn(4, 6)

    def front(model: nn.Module, trained: str = "two") -> Any:
        learner = LocalLearner(
            model,
            "lls",
            num_classes=2,
            blocks=["one", "two"],
            trained_blocks=trained,
            example_input=images,
        )
        return find_front(learner, images)

    assert front(Scaling()).cut_name == "two"
    with pytest.raises(UserError, match="reads more than its input"):
        front(Skipping())
    with pytest.raises(UserError, match="nothing is frozen before 'one'"):
        front(Scaling(), "all")
    with pytest.raises(UserError, match="Dropout 'dropout' in front of it is not frozen"):
        front(Dropping())


def test_a_full_disk_and_a_file_are_said(source: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a directory"):
        tune(source, images, tmp_path / "run", feature_cache=str(tmp_path / "file"))
    with pytest.raises(UserError, match="--cache-views 4, or leave --augment out"):
        tune(source, images, tmp_path / "run", feature_cache="cache", augment="basic")
    with pytest.raises(UserError, match="give --cache, too"):
        tune(source, images, tmp_path / "run", cache_views=3)
