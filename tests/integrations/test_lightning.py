"""LocalLightningModule: the learner's own steps, under Lightning's Trainer."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from locallearn import LocalLearner, UserError, build_model
from locallearn.integrations import LocalLightningModule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own advice: about loaders' workers, data that is not given, logging intervals.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

NUM_BATCHES, BATCH = 4, 8


def make_data(seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_BATCHES * BATCH) % 3
    noise = torch.randn(len(labels), 1, 8, 8, generator=generator)
    return TensorDataset(noise + labels[:, None, None, None], labels)


def loader(data: TensorDataset | None = None) -> DataLoader[Any]:
    return DataLoader(make_data() if data is None else data, batch_size=BATCH)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("smallconv", num_classes=3, in_channels=1, width=0.25, dropout=0.0)


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    usual = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(**{**usual, **settings})


def assert_same_state(ours: Any, expected: Any, where: str = "state") -> None:
    """Bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(ours, expected), where
    elif isinstance(expected, dict):
        assert list(ours) == list(expected), where
        for key, value in expected.items():
            assert_same_state(ours[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(ours) == len(expected), where
        for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert_same_state(one, other, f"{where}[{number}]")
    else:
        assert ours == expected, where


@pytest.mark.parametrize("rule", ["lls-mxm", "local-losses", "dfa", "bp"])
def test_training_is_the_learner_s_own(rule: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_model(), rule, num_classes=3)
    for _ in range(2):
        for images, labels in loader():
            learner.step(images, labels)

    module = LocalLightningModule(make_model(), rule, num_classes=3)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, loader())
    assert trainer.global_step == 2 * NUM_BATCHES
    assert_same_state(module.learner.training_state(), learner.training_state())
    images, _ = next(iter(loader()))
    assert torch.equal(module(images), learner(images))


def test_a_learner_made_already_is_taken(tmp_path: Path) -> None:
    learner = LocalLearner(make_model(), "lls", num_classes=3)
    module = LocalLightningModule(learner)
    make_trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert module.learner is learner
    other = LocalLearner(make_model(), "lls", num_classes=3)
    for images, labels in loader():
        other.step(images, labels)
    assert_same_state(learner.training_state(), other.training_state())


def test_bf16_mixed_is_the_learner_s_bf16(tmp_path: Path) -> None:
    learner = LocalLearner(make_model(), "lls", num_classes=3, precision="bf16")
    for images, labels in loader():
        learner.step(images, labels)
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    make_trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(module, loader())
    assert module.learner.precision == "bf16"
    assert_same_state(module.learner.training_state(), learner.training_state())


def test_evaluation_is_at_the_averaged_weights_with_fitting_statistics(tmp_path: Path) -> None:
    held_out = make_data(seed=2)
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, loader(), loader(held_out))
    validated = {name: value.item() for name, value in trainer.callback_metrics.items()}

    learner = LocalLearner(make_model(), "lls", num_classes=3)
    for _ in range(2):
        for images, labels in loader():
            learner.step(images, labels)
        logits = torch.cat([learner(images) for images, _ in loader(held_out)])
    labels = held_out.tensors[1]
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    assert validated["val_acc"] == pytest.approx(accuracy)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert validated["val_loss"] == pytest.approx(loss, rel=1e-5)

    (tested,) = trainer.test(module, loader(held_out), verbose=False)
    assert tested["test_acc"] == validated["val_acc"]
    assert tested["test_loss"] == validated["val_loss"]
    predicted = trainer.predict(module, loader(held_out))
    assert torch.equal(torch.cat(predicted), logits)
    images_alone = DataLoader(held_out.tensors[0], batch_size=BATCH)
    assert torch.equal(torch.cat(trainer.predict(module, images_alone)), logits)


def test_training_goes_on_after_a_validation_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The learner, not Lightning's flags, knows at which of its two points an optimizer is."""
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    trainer = make_trainer(tmp_path, max_epochs=2, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 2 * NUM_BATCHES


def test_steps_are_counted_once_and_logged(tmp_path: Path) -> None:
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, max_steps=6, logger=logger, log_every_n_steps=1)
    trainer.fit(module, loader())
    assert trainer.global_step == 6
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    blocks = {f"block_loss/{name}" for name in module.learner.block_names}
    assert blocks | {"train_loss", "train_acc", "step", "epoch"} == set(names)
    assert [int(row.split(",")[names.index("step")]) for row in rows] == list(range(6))


SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "epochs": {"schedule": lambda o: CosineAnnealingLR(o, T_max=4)},
    "steps": {"schedule": lambda o: StepLR(o, 3, 0.5), "schedule_interval": "step"},
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("schedulefree-adamw", "none"), ("sgd", "epochs"), ("adamw", "steps")],
)
@pytest.mark.parametrize("validates", [False, True], ids=["", "validates"])
def test_resumed_training_is_bit_for_bit_that_of_one_never_stopped(
    optimizer: str, schedule: str, validates: bool, tmp_path: Path
) -> None:
    def make_module() -> LocalLightningModule:
        settings = {"num_classes": 3, "optimizer": optimizer, **SCHEDULES[schedule]}
        return LocalLightningModule(make_model(), "lls-mxm", **settings)

    def fit(module: LocalLightningModule, epochs: int, **settings: Any) -> Trainer:
        checkpoints = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1)
        trainer = make_trainer(
            tmp_path, max_epochs=epochs, enable_checkpointing=True, callbacks=[checkpoints]
        )
        trainer.fit(module, loader(), loader() if validates else None, **settings)
        return trainer

    whole = make_module()
    fit(whole, 4)
    fit(make_module(), 2)
    resumed = make_module()
    trainer = fit(resumed, 4, ckpt_path=str(tmp_path / f"epoch=1-step={2 * NUM_BATCHES}.ckpt"))
    assert trainer.global_step == 4 * NUM_BATCHES
    assert_same_state(resumed.learner.training_state(), whole.learner.training_state())


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Of a loader that Lightning can put where it was; others it says it can't."""

    class Resumable(DataLoader[Any]):
        position = 0

        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__()):
                if number >= self.position:
                    self.position = number + 1
                    yield batch
            self.position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    def fit(module: LocalLightningModule, steps: int, **settings: Any) -> None:
        checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(
            tmp_path, max_steps=steps, enable_checkpointing=True, callbacks=[checkpoints]
        )
        trainer.fit(module, Resumable(make_data(), batch_size=BATCH), **settings)

    whole, resumed = (LocalLightningModule(make_model(), "lls", num_classes=3) for _ in range(2))
    fit(whole, 7)
    fit(resumed, 7, ckpt_path=str(tmp_path / "epoch=0-step=3.ckpt"))
    assert_same_state(resumed.learner.training_state(), whole.learner.training_state())


def test_a_checkpoint_is_tested_elsewhere(tmp_path: Path) -> None:
    module = LocalLightningModule(make_model(), "lls-mxm", num_classes=3)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader())
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    (expected,) = trainer.test(module, loader(), verbose=False)

    fresh = LocalLightningModule(make_model(), "lls-mxm", num_classes=3)
    (tested,) = make_trainer(tmp_path).test(fresh, loader(), ckpt_path=path, verbose=False)
    assert tested == expected
    loaded = LocalLightningModule.load_from_checkpoint(
        path, model=make_model(), rule="lls-mxm", num_classes=3
    )
    images, _ = next(iter(loader()))
    assert torch.equal(loaded(images), module(images))
    assert set(torch.load(path)["state_dict"]) == {f"model.{n}" for n in module.model.state_dict()}


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    module = LocalLightningModule(make_model(), "lls-mxm", num_classes=3)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = LocalLightningModule(make_model(), "lls-m", num_classes=3)
    with pytest.raises(UserError, match="the checkpoint is of another model, rule or optimizer"):
        make_trainer(tmp_path).test(other, loader(), ckpt_path=tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="is not of a LocalLightningModule: it has no learner"):
        other.on_load_checkpoint({"state_dict": {}})


def test_a_schedule_reaches_every_block(tmp_path: Path) -> None:
    schedule: Callable[[Any], Any] = lambda optimizer: StepLR(optimizer, 1, 0.1)  # noqa: E731
    module = LocalLightningModule(
        make_model(), "lls", num_classes=3, optimizer="sgd", lr=1.0, schedule=schedule
    )
    monitor = LearningRateMonitor()
    logger = CSVLogger(tmp_path)
    make_trainer(tmp_path, max_epochs=2, callbacks=[monitor], logger=logger).fit(module, loader())
    for name, optimizer in module.learner.optimizers.items():
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01), name
    assert len(monitor.lrs) == len(module.learner.optimizers)


def test_a_plateau_is_one_of_the_validation_loss(tmp_path: Path) -> None:
    def schedule(optimizer: Any) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)

    def make_module() -> LocalLightningModule:
        return LocalLightningModule(
            make_model(), "lls", num_classes=3, optimizer="sgd", lr=0.08, schedule=schedule
        )

    module = make_module()
    make_trainer(tmp_path, max_epochs=4).fit(module, loader(), loader())
    assert module.learner.optimizers["conv1"].param_groups[0]["lr"] == pytest.approx(0.005)
    with pytest.raises(UserError, match="ReduceLROnPlateau watches val_loss; give the Trainer val"):
        make_trainer(tmp_path, max_epochs=1).fit(make_module(), loader())


def test_a_learner_goes_where_the_next_trainer_is(tmp_path: Path) -> None:
    """Another precision, as another device, means another learner, with the state of the first."""
    module = LocalLightningModule(make_model(), "lls-mxm", num_classes=3)
    make_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    first, state = module.learner, copy.deepcopy(module.learner.training_state())
    make_trainer(tmp_path, precision="bf16-mixed").validate(module, loader(), verbose=False)
    assert module.learner is not first
    assert_same_state(module.learner.training_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val is not supported: .* step_pre_hook"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches is not supported: each block"),
        ({"precision": "bf16-true"}, r"precision 'bf16-true' is not supported. Valid: 32-true, bf"),
        ({"precision": "64-true"}, r"precision '64-true' is not supported"),
        (
            {"strategy": "ddp", "devices": 1},
            r"trains on one device; .* not there yet. Use Trainer\(devices=1, strategy='auto'\)",
        ),
    ],
)
def test_what_a_learner_cannot_do_is_said(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    module.trainer = make_trainer(tmp_path, max_epochs=1, **settings)
    with pytest.raises(UserError, match=message):
        module.configure_callbacks()


def test_clipping_is_refused_before_lightning_does(tmp_path: Path) -> None:
    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    with pytest.raises(UserError, match="gradient_clip_val is not supported"):
        make_trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0).fit(module, loader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LocalLightningModule(make_model(), "lls", precision="bf16"),
            r"precision is the Trainer's: .*Trainer\(precision='bf16-mixed'\)",
        ),
        (
            lambda: LocalLightningModule(LocalLearner(make_model()), "lls"),
            r"a learner has its rule and settings already",
        ),
        (
            lambda: LocalLightningModule(make_model(), schedule_interval="batch"),
            r"unknown schedule_interval 'batch'. Valid: epoch, step",
        ),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_learner_made_for_something_else_is_refused(tmp_path: Path) -> None:
    module = LocalLightningModule(LocalLearner(make_model(), "lls", precision="bf16"))
    message = r"the learner is on cpu in bf16, and the Trainer on cpu in fp32. Make it so, or give"
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, max_epochs=1).fit(module, loader())


def test_callbacks_see_each_step_end(tmp_path: Path) -> None:
    class Noting(Callback):
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    module = LocalLightningModule(make_model(), "lls", num_classes=3)
    noting = Noting()
    make_trainer(tmp_path, max_epochs=3, callbacks=[noting]).fit(module, loader())
    assert len(noting.losses) == 3 * NUM_BATCHES
    assert noting.losses[-1] < noting.losses[0]


def test_without_lightning_one_line_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "import locallearn.integrations\n"
        "try:\n"
        "    from locallearn.integrations import LocalLightningModule\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = "LocalLightningModule needs Lightning: pip install 'locallearn[lightning]'."
    assert done.stdout.strip() == said
