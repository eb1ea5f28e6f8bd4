"""Optimizers and schedules by name. Each block has an optimizer of its own.

A schedule-free optimizer keeps two points for each parameter, y to train at and x to evaluate
at, and switches between them; `set_mode` does that for any optimizer, and nothing for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, ReduceLROnPlateau

from locallearn.errors import UserError
from locallearn.kernels import ScheduleFreeState, load_kernels
from locallearn.models import Block
from locallearn.registry import Registry
from locallearn.rules import Pepita, Rule

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


class ScheduleFreeAdamW(AdamWScheduleFree):  # type: ignore[misc]
    """The package's Schedule-Free AdamW, stepped by the op `schedulefree_step`.

    Parameters, state and the train/eval switch are the package's. The step counter, the sum of
    weights and the highest learning rate are 0-d float64 tensors on the parameters' device instead
    of numbers on the host, so that a step can be captured in a CUDA graph.

    Arguments:
        params, lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power: as the package's.
        averages_by_bias_correction: x, the point to evaluate at, is a weighted average of the z_k.
            The package weighs every step alike; up to version 1.2.7 it weighed step k by its bias
            correction, 1 - beta2^(k+1), so that the first thousand steps counted less. All of the
            paper's results come from that: five epochs of CIFAR-10 (SmallConv, LLS) end 0.8
            points higher with it.

    Attributes:
        backend: whose kernel steps.

    Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        averages_by_bias_correction: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        # Where the package keeps what does not change: copies and pickles of an optimizer have it.
        self.defaults["averages_by_bias_correction"] = averages_by_bias_correction
        self.backend = "reference"
        self._rates: list[tuple[float, torch.Tensor]] = []
        self._place_clocks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "backend" not in vars(self):  # in a copy, and not in one that loads a state
            self.backend = "reference"
        self._place_clocks()

    def _place_clocks(self) -> None:
        """The counters as tensors where the parameters are, and the learning rates beside them."""
        self._rates = []
        for group in self.param_groups:
            device = group["params"][0].device
            # MPS has no float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            for name in ("k", "weight_sum", "lr_max"):
                value = torch.as_tensor(group[name], dtype=dtype, device=device)
                group[name] = value.detach().clone()
            self._rates.append((group["lr"], torch.full_like(group["k"], group["lr"])))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "_rates"):  # and not on the way through the constructor
            self._place_clocks()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._place_clocks()

    def write_rates(self) -> None:
        """Write to the device those learning rates that have changed since they were written."""
        for number, (group, (written, rate)) in enumerate(
            zip(self.param_groups, self._rates, strict=True)
        ):
            if written != group["lr"]:
                rate.fill_(group["lr"])
                self._rates[number] = (group["lr"], rate)

    def _laid_out(self, p: torch.Tensor) -> bool:
        """Whether z and the second moment lie in memory as the parameter does, densely.

        They are laid out anew where the parameter has been, as a change of memory format does it.
        """
        state = self.state[p]
        for name in ("z", "exp_avg_sq"):
            if state[name].stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(state[name])
        return all(state[name].stride() == p.stride() for name in ("z", "exp_avg_sq"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("the optimizer must be in training mode to step: call train().")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.write_rates()
        for group, (_, rate) in zip(self.param_groups, self._rates, strict=True):
            active = [p for p in group["params"] if p.grad is not None]
            for p in active:
                if "z" not in self.state[p]:
                    layout = torch.preserve_format
                    self.state[p]["z"] = torch.clone(p, memory_format=layout)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=layout)
            # The other backends go through memory in order, which a slice of a tensor is not.
            backend = self.backend if all(map(self._laid_out, active)) else "reference"
            load_kernels(backend).schedulefree_step(
                active,
                [p.grad for p in active if p.grad is not None],
                [self.state[p]["z"] for p in active],
                [self.state[p]["exp_avg_sq"] for p in active],
                ScheduleFreeState(group["k"], group["weight_sum"], rate, group["lr_max"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                warmup_steps=group["warmup_steps"],
                r=group["r"],
                weight_lr_power=group["weight_lr_power"],
                averages_by_bias_correction=self.defaults["averages_by_bias_correction"],
            )
        return loss


@dataclass(frozen=True)
class OptimizerSpec:
    """A registered optimizer: the learning rate it is usually run at, and how to make it."""

    summary: str
    default_lr: float
    is_schedule_free: bool
    build: Callable[[list[nn.Parameter], float, float], Optimizer]


_OPTIMIZERS: Registry[OptimizerSpec] = Registry("optimizer")
_OPTIMIZERS.add(
    "schedulefree-adamw",
    OptimizerSpec(
        "Schedule-Free AdamW, betas (0.9, 0.999): the paper's",
        5e-3,
        True,
        lambda p, lr, wd: ScheduleFreeAdamW(
            p, lr=lr, weight_decay=wd, averages_by_bias_correction=True
        ),
    ),
)
_OPTIMIZERS.add(
    "schedulefree-sgd",
    OptimizerSpec(
        "Schedule-Free SGD, momentum 0.9",
        1.0,
        True,
        lambda p, lr, wd: SGDScheduleFree(p, lr=lr, momentum=0.9, weight_decay=wd),
    ),
)
_OPTIMIZERS.add(
    "adamw",
    OptimizerSpec(
        "AdamW, betas (0.9, 0.999)",
        1e-3,
        False,
        lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd),
    ),
)
_OPTIMIZERS.add(
    "adam",
    OptimizerSpec(
        "Adam, betas (0.9, 0.999)",
        1e-3,
        False,
        lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd),
    ),
)
_OPTIMIZERS.add(
    "sgd",
    OptimizerSpec(
        "SGD, momentum 0.9",
        0.05,
        False,
        lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    ),
)

# At the paper's rate a first step changes what a layer of thousands of inputs yields by more than
# it was, unless a BatchNorm behind it takes that back (vgg11 without: the loss goes from 1.4 to 98
# in three steps at 1e-3 already).
_LR_WITHOUT_BATCH_NORM = 3e-4
_PEPITA_LR = 0.01  # its paper's, for convolutional networks

SCHEDULES = ("none", "cosine", "multistep", "plateau")
# Of the epochs, after which a multi-step schedule multiplies the rate by 0.1.
_MILESTONES = (0.5, 0.75)
_PLATEAU_PATIENCE = 5


def list_optimizers() -> list[str]:
    """Names of the optimizers, sorted."""
    return _OPTIMIZERS.names()


def list_schedules() -> list[str]:
    """Names of the learning-rate schedules."""
    return list(SCHEDULES)


def optimizer_spec(name: str) -> OptimizerSpec:
    """What is registered under a name. Raises UserError with the valid names."""
    return _OPTIMIZERS.get(name)


def usual_optimizer(rule: Rule, name: str | None = None) -> tuple[str, float]:
    """The optimizer of that name, or the one a rule is usually trained with, and its learning rate.

    PEPITA's is its paper's, SGD with momentum: its updates are small differences, of which Adam
    makes steps of full length whatever they are worth (SmallConv on MNIST: 24 % with
    schedulefree-adamw where sgd reaches 95 %).
    """
    usual = "sgd" if isinstance(rule, Pepita) else "schedulefree-adamw"
    name = usual if name is None else name
    has_own_rate = isinstance(rule, Pepita) and name == usual
    return name, _PEPITA_LR if has_own_rate else optimizer_spec(name).default_lr


def optimizer_factory(
    optimizer: str | OptimizerFactory | None,
    *,
    lr: float | None,
    weight_decay: float,
    rule: Rule | None = None,
    model: nn.Module | None = None,
) -> OptimizerFactory:
    """A function from parameters to an optimizer.

    Arguments:
        optimizer: a name, or already such a function (then lr and weight decay are its own); the
            rule's usual one where None.
        lr: learning rate; the optimizer's usual one where None.
        weight_decay: as the optimizer defines it.
        rule: needed where no optimizer is named.
        model: whose norms the usual learning rate goes by.
    """
    if rule is not None and (optimizer is None or isinstance(optimizer, str)):
        optimizer, usual_lr = usual_optimizer(rule, optimizer)
        if optimizer == "schedulefree-adamw" and model is not None and not _is_normalized(model):
            usual_lr = _LR_WITHOUT_BATCH_NORM
        lr = usual_lr if lr is None else lr
    assert optimizer is not None
    if not isinstance(optimizer, str):
        if lr is not None or weight_decay:
            raise UserError("lr and weight_decay belong to a named optimizer, not to a function.")
        return optimizer
    spec = optimizer_spec(optimizer)
    rate = spec.default_lr if lr is None else lr
    if not 0 < rate < math.inf:
        raise UserError(f"lr must be above 0, got {rate}.")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay must be at least 0, got {weight_decay}.")
    return lambda parameters: spec.build(parameters, rate, weight_decay)


def _is_normalized(model: nn.Module) -> bool:
    """Whether a model holds a BatchNorm, or blocks of the package, as the paper's networks do."""
    kinds = (nn.modules.batchnorm._BatchNorm, Block)
    return any(isinstance(module, kinds) for module in model.modules())


def set_mode(optimizers: Iterable[Optimizer], *, training: bool) -> None:
    """Put the weights at the point to train at, or at the point to evaluate at.

    Only schedule-free optimizers have two; switching to the mode one is in does nothing.
    """
    for optimizer in optimizers:
        switch = getattr(optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()


def check_schedule(schedule: str, optimizer: str) -> None:
    """Raises UserError for an unknown schedule, or one that the optimizer does without."""
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}. Valid: {', '.join(SCHEDULES)}.")
    if schedule != "none" and optimizer_spec(optimizer).is_schedule_free:
        plain = ", ".join(n for n in _OPTIMIZERS if not _OPTIMIZERS.get(n).is_schedule_free)
        raise UserError(
            f"{optimizer} is schedule-free and takes no schedule, got {schedule!r}. "
            f"Use one of {plain}, or --schedule none."
        )


def build_schedule(
    schedule: str, optimizer: Optimizer, num_epochs: int
) -> LRScheduler | ReduceLROnPlateau | None:
    """A schedule that steps once an epoch, or None for "none".

    cosine: to zero over the epochs. multistep: times 0.1 after a half and after three quarters
    of them. plateau: times 0.1 after 5 epochs in which the watched loss did not fall.
    """
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=num_epochs)
    if schedule == "multistep":
        milestones = sorted({max(1, round(share * num_epochs)) for share in _MILESTONES})
        return MultiStepLR(optimizer, milestones, gamma=0.1)
    if schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=_PLATEAU_PATIENCE)
    return None
