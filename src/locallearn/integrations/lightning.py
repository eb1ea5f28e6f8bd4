"""A LightningModule whose steps are a LocalLearner's.

Lightning is told that optimisation is manual: the blocks are updated inside the forward. It still
needs one optimizer, to count steps by, to put learning rates in and to save; `BlockOptimizers` is
that.

Shapes: N batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_map_only

from locallearn.engine import LocalLearner, StepResult
from locallearn.errors import UserError
from locallearn.rules import Rule

try:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    raise UserError(
        "LocalLightningModule needs Lightning: pip install 'locallearn[lightning]'."
    ) from error

Schedule = LRScheduler | ReduceLROnPlateau

# The Trainer's precision -> the learner's.
_PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}
_INTERVALS = ("epoch", "step")
_STATE = "locallearn"  # under which name a checkpoint holds the learner's training state


class BlockOptimizers(Optimizer):
    """A learner's optimizers as one.

    Its parameter groups are those of the blocks' optimizers, the very same dicts, so that what a
    schedule writes into them is what the blocks learn with.
    """

    def __init__(self, learner: LocalLearner) -> None:
        self._learner = learner
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        optimizers = self._learner.optimizers.values()
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing but the closure: the blocks have been updated when their step is over."""
        return None if closure is None else closure()

    def state_dict(self) -> dict[str, Any]:
        return {name: o.state_dict() for name, o in self._learner.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizer in self._learner.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self.param_groups = self._groups()  # the optimizers have made new ones


class LocalLightningModule(LightningModule):
    """Trains a model by a local rule under Lightning's Trainer.

    Batches are (images, labels); images may be whatever :meth:`LocalLearner.step` takes. Logged
    are train_loss, train_acc and block_loss/NAME of each block at every step, and val_loss,
    val_acc, test_loss and test_acc; accuracies are shares, 0 to 1. Calling the module infers, at
    the optimizer's averaged weights, as validation, test and prediction do.

    Arguments:
        model: as :class:`LocalLearner` takes it; or a learner that is made already, on the device
            and in the precision that the Trainer has.
        rule: a name or a rule; "lls" where None.
        schedule: from an optimizer to a learning-rate schedule of all the blocks', e.g.
            ``lambda optimizer: CosineAnnealingLR(optimizer, T_max=10)``. A ReduceLROnPlateau
            watches val_loss.
        schedule_interval: "epoch" or "step", after which the schedule goes on.
        settings: the learner's other arguments; its precision is the Trainer's. A model that is
            not of this package needs its ``example_input``, since Lightning asks for the
            optimizers before there is a batch.

    Raises:
        UserError: settings given with a learner that has its own.
    """

    def __init__(
        self,
        model: nn.Module | LocalLearner,
        rule: str | Rule | None = None,
        *,
        schedule: Callable[[Optimizer], Schedule] | None = None,
        schedule_interval: str = "epoch",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if schedule_interval not in _INTERVALS:
            raise UserError(
                f"unknown schedule_interval {schedule_interval!r}. Valid: {', '.join(_INTERVALS)}."
            )
        if "precision" in settings:
            raise UserError(
                "precision is the Trainer's: leave it out here, and give "
                "Trainer(precision='bf16-mixed') for bf16."
            )
        # The learner is no submodule, and so in a list: the model would be there twice, and
        # Lightning would set modules' flags without the learner's switch between the optimizers'
        # two points.
        self._learners: list[LocalLearner] = []
        self._made_for: tuple[torch.device, str] | None = None
        self._is_given = isinstance(model, LocalLearner)
        if isinstance(model, LocalLearner):
            if rule is not None or settings:
                raise UserError(
                    "a learner has its rule and settings already: leave them out, or give the "
                    "model instead of the learner."
                )
            self._learners = [model]
            self._made_for = (_device(model), model.precision)
            model = model.model
        self.model = model
        self._rule = "lls" if rule is None else rule
        self._settings = settings
        self._schedule = schedule
        self._schedule_interval = schedule_interval

    @property
    def learner(self) -> LocalLearner:
        """The learner; made for the device that the model is on if there is no Trainer yet."""
        if not self._learners:
            self._make_learner(_device(self.model), "fp32")
        return self._learners[0]

    def _make_learner(self, device: torch.device, precision: str) -> None:
        """A learner for this device and precision, with the state of the one before, if any."""
        state = self._learners[0].training_state() if self._learners else None
        self.model.to(device)
        settings = tree_map_only(Tensor, lambda tensor: tensor.to(device), self._settings)
        learner = LocalLearner(self.model, self._rule, precision=precision, **settings)
        if state is not None:
            learner.load_training_state(state)
        self._learners = [learner]
        self._made_for = (device, precision)

    # -- before a run ---------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        # The first hook there is: Lightning's own refusal of clipping and accumulation, which comes
        # next, advises automatic optimization.
        trainer = self.trainer
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise UserError(
                f"a LocalLearner trains on one device; spreading layers or batches over several is "
                f"not there yet. Use Trainer(devices=1, strategy='auto'), which here has "
                f"{trainer.world_size} with {type(trainer.strategy).__name__}."
            )
        if trainer.precision not in _PRECISIONS:
            raise UserError(
                f"precision {trainer.precision!r} is not supported. Valid: "
                f"{', '.join(_PRECISIONS)}."
            )
        if trainer.gradient_clip_val:
            raise UserError(
                "gradient_clip_val is not supported: a block's gradient is used and freed inside "
                "the forward. Clip in the optimizer: give optimizer= a function that registers a "
                "step_pre_hook (docs/own-loop.md)."
            )
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "accumulate_grad_batches is not supported: each block is updated by every batch, "
                "and holds one block's activations at a time. Use larger batches."
            )
        return []

    def setup(self, stage: str) -> None:
        # Here the Trainer's device is known, and no checkpoint has been read yet.
        device = self.trainer.strategy.root_device
        precision = _PRECISIONS[self.trainer.precision]
        if self._made_for == (device, precision):
            return
        if self._is_given:
            own = " in ".join(map(str, self._made_for or ()))
            raise UserError(
                f"the learner is on {own}, and the Trainer on {device} in {precision}. Make it "
                f"so, or give the model instead of the learner."
            )
        self._make_learner(device, precision)

    def configure_optimizers(self) -> Any:
        optimizer = BlockOptimizers(self.learner)
        if self._schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": self._schedule(optimizer),
                "interval": self._schedule_interval,
            },
        }

    # -- a run ----------------------------------------------------------------------------------

    def forward(self, images: Any) -> Tensor:
        """Inference: logits, (N, K)."""
        if self.model.training:  # flags that Lightning has put back after an evaluation
            self.learner.eval()
        logits: Tensor = self.learner(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        if not self.model.training:
            self.learner.train()
        result = self.learner.step(images, labels)
        # Stepping one of its own wrapped optimizers is how Lightning counts a step of manual
        # optimisation: trainer.global_step, and with it max_steps and loggers, go by it.
        self.optimizers().step()  # type: ignore[union-attr]
        if self._schedule_interval == "step":
            self._go_on_with_schedule()
        self._log_step(result, labels)
        return result.loss

    def _log_step(self, result: StepResult, labels: Tensor) -> None:
        num_images = len(labels)
        self.log("train_loss", result.loss, prog_bar=True, batch_size=num_images)
        self.log("train_acc", _accuracy(result.logits, labels), batch_size=num_images)
        blocks = {f"block_loss/{name}": loss for name, loss in result.block_losses.items()}
        self.log_dict(blocks, batch_size=num_images)

    def on_train_epoch_end(self) -> None:
        if self._schedule_interval == "epoch":
            self._go_on_with_schedule()

    def _go_on_with_schedule(self) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau):
            metrics = self.trainer.callback_metrics
            if "val_loss" not in metrics:
                raise UserError("a ReduceLROnPlateau watches val_loss; give the Trainer val data.")
            schedule.step(metrics["val_loss"])
        elif isinstance(schedule, LRScheduler):
            schedule.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, part: str) -> None:
        images, labels = batch
        logits = self(images)
        metrics = {
            f"{part}_loss": F.cross_entropy(logits, labels),
            f"{part}_acc": _accuracy(logits, labels),
        }
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits, (N, K), of a batch of images, or of (images, labels)."""
        has_labels = isinstance(batch, list | tuple) and len(batch) == 2
        logits: Tensor = self(batch[0] if has_labels else batch)
        return logits

    # -- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Its tensors are those of the weights and optimizers that are in the checkpoint already,
        # and torch saves each once.
        checkpoint[_STATE] = self.learner.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _STATE not in checkpoint:
            raise UserError("the checkpoint is not of a LocalLightningModule: it has no learner.")
        try:
            self.learner.load_training_state(checkpoint[_STATE])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint is of another model, rule or optimizer ({error})."
            ) from error


def _device(module: nn.Module) -> torch.device:
    """Of its first parameter."""
    return next(module.parameters(), torch.empty(0)).device


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images whose highest logit is their label's."""
    return (logits.argmax(dim=1) == labels).float().mean()
