"""What a learner is made of: units, heads, optimizers, and the step that runs them.

Shapes: N batch, K classes, T latent length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from locallearn.engine.blocks import BlockPlan, NetworkPlan, WithoutGraph, forwards_through
from locallearn.engine.optimizers import OptimizerFactory
from locallearn.engine.procedures import (
    ErrorUnit,
    ErrorUpdates,
    LocalUpdates,
    ModulatedUnit,
    OutputLayer,
    Procedure,
    TwoForwards,
    build_backpropagation,
)
from locallearn.engine.reduction import Updates
from locallearn.engine.units import BlockUnit, build_unit
from locallearn.errors import UserError
from locallearn.models import Block
from locallearn.rules import (
    Backprop,
    ErrorRule,
    HeadSpec,
    LocalRule,
    Pepita,
    Requirement,
    Rule,
)


@dataclass(frozen=True)
class Settings:
    """What a learner is built by.

    Arguments:
        num_classes: K.
        make_optimizer: from parameters to their optimizer.
        group_blocks: so many blocks at a time learn together.
        head_after_pool: heads read what blocks hand on, after their max-pool.
        compile: run what takes the generic path through torch.compile.
        allow_reuse: whether a block may run, and learn, more than once in a forward.
        side_stream: for what the next block does not wait for; None runs it in line.
        updates: step the optimizers.
    """

    num_classes: int
    make_optimizer: OptimizerFactory
    group_blocks: int = 1
    head_after_pool: bool = False
    compile: bool = False
    allow_reuse: bool = False
    side_stream: torch.cuda.Stream | None = None
    updates: Updates = field(default_factory=Updates)


@dataclass(frozen=True)
class Assembly:
    """The parts of a learner.

    Arguments:
        units: one for each block, or group of blocks.
        heads: of the units, in their order; and whatever else the rule trains.
        rest_optimizers: of what lies in no block: "" -> its optimizer, or, with bp's
            fused-optimizer, parameter name -> its own.
        frozen: modules that stay in evaluation mode.
        frozen_forwards: module -> what stands in for its forward where no gradient is asked for.
        procedure: the training step.
    """

    units: list[BlockUnit]
    heads: list[nn.Module]
    rest_optimizers: dict[str, Optimizer]
    frozen: list[nn.Module]
    frozen_forwards: dict[nn.Module, Callable[..., Any]]
    procedure: Procedure


def assemble(
    model: nn.Module, rule: Rule, plan: NetworkPlan | None, settings: Settings
) -> Assembly:
    """The parts of a learner. What the plan says is frozen is so from here on.

    Arguments:
        model: whose blocks the plan names.
        rule: makes the heads.
        plan: the blocks; None of a rule that has none (bp, unless it checkpoints).
        settings: see there.

    Raises:
        UserError: settings that do not go together.
    """
    if rule.requires in (Requirement.END_TO_END, Requirement.TWO_FORWARDS):
        _check_not_blockwise(rule, settings)
    frozen: dict[nn.Module, Callable[..., Any]] = {}
    frozen_modules: list[nn.Module] = []
    if plan is not None:
        frozen = _frozen_forwards(plan)
        frozen_modules = _freeze(model, plan)
    units: list[BlockUnit] = []
    if plan is not None and rule.requires is not Requirement.END_TO_END:
        units = _build_units(model, rule, plan, settings)
    heads = [unit.head for unit in units if unit.head is not None]
    in_units = {
        id(p)
        for unit in units
        if unit.optimizer is not None
        for group in unit.optimizer.param_groups
        for p in group["params"]
    }
    rest = {
        name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_units
    }
    rest_optimizers: dict[str, Optimizer] = {}
    if isinstance(rule, Backprop) and rule.bp_memory == "fused-optimizer":
        rest_optimizers = {name: settings.make_optimizer([p]) for name, p in rest.items()}
    elif rest:
        rest_optimizers = {"": settings.make_optimizer(list(rest.values()))}
    output_layer = OutputLayer(
        rest,
        rest_optimizers.get(""),
        num_classes=settings.num_classes,
        label_smoothing=rule.label_smoothing,
        is_behind_blocks=bool(units),
        is_shared=bool(units) and plan is not None and bool(plan.shared),
        updates=settings.updates,
    )
    if isinstance(rule, Backprop):
        checkpointed = [] if plan is None else [block.module for block in plan.blocks]
        procedure: Procedure = build_backpropagation(
            rule,
            model,
            checkpointed,
            output_layer,
            rest_optimizers,
            settings.compile,
            frozen_runs=() if plan is None else plan.frozen_runs,
        )
    elif isinstance(rule, LocalRule):
        procedure = LocalUpdates(
            model,
            units,
            output_layer,
            settings.side_stream,
            allow_reuse=settings.allow_reuse,
            frozen=frozen,
        )
    elif isinstance(rule, ErrorRule):
        waiting = [unit for unit in units if isinstance(unit, ErrorUnit)]
        procedure = ErrorUpdates(model, waiting, output_layer, frozen)
    elif isinstance(rule, Pepita):
        modulator = rule.build_modulator(settings.num_classes)
        modulator.to(next(model.parameters()).device)
        heads.append(modulator)
        modulated = [unit for unit in units if isinstance(unit, ModulatedUnit)]
        procedure = TwoForwards(
            model, modulated, output_layer, modulator, update_order=rule.update_order
        )
    else:
        raise UserError(
            f"rule {rule.name!r} needs {rule.requires}, but is neither a LocalRule nor an "
            f"ErrorRule, Pepita or Backprop: the engine does not know how to run it."
        )
    if not units and not rest:
        raise UserError(
            "nothing is left to learn: no block is trained, and no parameter in front of the "
            "logits lies outside the blocks. Name blocks to train."
        )
    return Assembly(units, heads, rest_optimizers, frozen_modules, frozen, procedure)


def _frozen_forwards(plan: NetworkPlan) -> dict[nn.Module, Callable[..., Any]]:
    """Module -> what stands in for its forward, of blocks that stay as they are: they build no
    graph, and none leads through them."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for block in plan.blocks:
        if block.is_frozen:
            forwards |= forwards_through(block.module, WithoutGraph(block.module.forward))
    for run in plan.frozen_runs:
        forwards |= run.forwards()
    return forwards


def _freeze(model: nn.Module, plan: NetworkPlan) -> list[nn.Module]:
    """No gradients for what is frozen; the modules that stay in evaluation mode."""
    for name in plan.frozen_parameters:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.grad = None
    return [model.get_submodule(name) for name in plan.frozen_modules]


def _build_units(
    model: nn.Module, rule: Rule, plan: NetworkPlan, settings: Settings
) -> list[BlockUnit]:
    """A unit for each block, or for each group of them, named after the last."""
    if settings.allow_reuse and not isinstance(rule, LocalRule):
        raise UserError(
            f"allow_reuse has a block learn each time it runs; rule {rule.name!r}, whose blocks "
            f"wait for the whole forward, can't. Leave it out."
        )
    if settings.compile and rule.requires is Requirement.TWO_FORWARDS:
        raise UserError(f"rule {rule.name!r} runs layer by layer, and is not compiled.")
    named = dict(model.named_parameters())
    shared = {id(named[name]) for name in plan.shared}
    units: list[BlockUnit] = []
    for group in grouped(plan.blocks, settings.group_blocks):
        last = group[-1]
        if last.is_frozen:
            continue
        joined = [named[name] for block in group for name in block.joined]
        held = [p for block in group for p in block.module.parameters()]
        parameters = [p for p in dict.fromkeys([*held, *joined]) if id(p) not in shared]
        common: dict[str, Any] = {
            "name": last.name,
            "block": last.module,
            "updates": settings.updates,
        }
        if not isinstance(rule, LocalRule | ErrorRule):
            optimizer = _optimizer_of(parameters, settings)
            units.append(ModulatedUnit(optimizer=optimizer, **common))
            continue
        reference = held[0] if held else torch.empty(0)
        spec = head_spec(last, settings.num_classes, head_dtype(reference), rule)
        head = rule.build_head(spec).to(reference.device)
        common |= {
            "head": head,
            "latent_size": spec.latent_size,
            "optimizer": _optimizer_of([*parameters, *head.parameters()], settings),
            "leaders": [block.module for block in group[:-1]],
            "reads_loose": any(block.reads_loose for block in group),
            "compile_block": settings.compile,
            "head_after_pool": settings.head_after_pool,
        }
        if last.layout is not None:
            common["layout"] = last.layout
        if isinstance(rule, ErrorRule):
            units.append(ErrorUnit(**common))
        else:
            form = last.closed_form()
            units.append(build_unit(form=form, side_stream=settings.side_stream, **common))
    return units


def head_dtype(reference: torch.Tensor) -> torch.dtype:
    """Of a head whose block has such a parameter."""
    return torch.float64 if reference.dtype == torch.float64 else torch.float32


def head_spec(
    plan: BlockPlan, num_classes: int, dtype: torch.dtype, rule: LocalRule | ErrorRule
) -> HeadSpec:
    """What a block's head must fit.

    Arguments:
        plan: of the block.
        num_classes: K.
        dtype: of the head.
        rule: whose head it is.
    """
    block = plan.module
    if rule.fits_any_output:
        return HeadSpec(1, num_classes, dtype=dtype)
    if isinstance(block, Block):
        return HeadSpec(
            block.latent_length,
            num_classes,
            block.basis_length,
            dtype,
            latent_size=block.latent_size,
            num_channels=block.out_channels,
            is_linear=block.is_linear,
        )
    assert plan.view_shape is not None
    latent_size, latent_length = plan.latent_size()
    return HeadSpec(
        latent_length,
        num_classes,
        None,
        dtype,
        latent_size=latent_size,
        num_channels=plan.view_shape[1],
        is_linear=len(plan.view_shape) == 2,
    )


def grouped(blocks: Sequence[BlockPlan], size: int) -> list[Sequence[BlockPlan]]:
    """So many blocks at a time; the last group may have fewer."""
    if size < 1:
        raise UserError(f"group_blocks must be at least 1, got {size}.")
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]


def _optimizer_of(parameters: Sequence[nn.Parameter], settings: Settings) -> Optimizer | None:
    trained = [p for p in parameters if p.requires_grad]
    return settings.make_optimizer(trained) if trained else None


def _check_not_blockwise(rule: Rule, settings: Settings) -> None:
    """These settings are of blocks' heads, which bp and pepita do not have."""
    for argument, is_given in (
        ("group_blocks", settings.group_blocks != 1),
        ("head_after_pool", settings.head_after_pool),
    ):
        if is_given:
            raise UserError(
                f"{argument} says what a block's head reads; rule {rule.name!r} has no "
                f"such heads. Leave it out."
            )
