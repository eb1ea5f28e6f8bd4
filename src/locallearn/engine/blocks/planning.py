"""From a model to its blocks: which modules they are, and which parameters learn with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from locallearn.engine.blocks.chain import Chain, modules_of
from locallearn.engine.blocks.choosing import Blocks, choose
from locallearn.engine.blocks.frozen_runs import FrozenRun
from locallearn.engine.blocks.layout import PLAIN, LatentSize, Layout, latent_size_of
from locallearn.engine.blocks.policy import automatic, reuse_error
from locallearn.engine.blocks.recognition import ClosedForm, recognize
from locallearn.engine.blocks.trace import Call, Inputs, not_of_the_batch, trace_few
from locallearn.engine.blocks.wiring import Wiring, watch
from locallearn.errors import UserError
from locallearn.models import Block


@dataclass
class BlockPlan:
    """A block to be.

    Attributes:
        name: of its module in the model; of a chain, of the layer with weights.
        names: of its modules in the model: one, or a chain in the order of the forward.
        module: what computes it.
        joined: names of the parameters that lie in no block and learn with this one, which alone
            reads them.
        reads_loose: whether graphs of its inputs lead to parameters that lie in no block: the
            joined ones, or such as others read too.
        layout: how its output lies; None until a forward has been watched.
        view_shape: of what its head reads, (N, C, H, W) or (N, F), in that forward.
        inputs_from: names of the blocks whose outputs it reads.
        is_frozen: whether it stays as it is; see `freezing`.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    joined: tuple[str, ...] = ()
    reads_loose: bool = False
    layout: Layout | None = None
    view_shape: torch.Size | None = None
    inputs_from: tuple[str, ...] = ()
    is_frozen: bool = False

    @property
    def members(self) -> tuple[nn.Module, ...]:
        """Its modules in the model."""
        return modules_of(self.module)

    def latent_size(self) -> tuple[LatentSize, int]:
        """What its output is pooled to, and the latent's length T."""
        assert self.view_shape is not None
        assert self.layout is not None
        view = torch.empty(self.view_shape, device="meta")
        return latent_size_of(view, is_sequence=self.layout.is_sequence)

    def closed_form(self) -> ClosedForm | None:
        """What the closed form needs of the block; None where it does not cover the block, or not
        what learns with it, or how its output lies."""
        if self.reads_loose:
            return None
        if self.layout is not None and not isinstance(self.module, Block):
            is_square = isinstance(self.latent_size()[0], int)
            if self.layout != PLAIN or not is_square:
                return None
        return recognize(self.module)


@dataclass
class NetworkPlan:
    """The blocks of a model.

    Attributes:
        blocks: in the order of the forward; where they were named, in that of ``named_modules``.
        shared: names of the parameters that several blocks, or a block and the output layer, read:
            they learn from the sum of their gradients at the end of the step.
        output: names of the parameters that lie in no block and that the logits are made with.
        frozen_parameters: names of those that stay as they are: of frozen blocks, and what they
            alone read.
        frozen_modules: names of the modules that stay in evaluation mode.
        frozen_runs: modules of frozen blocks, and between them, that run in one go.
    """

    blocks: list[BlockPlan]
    shared: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()
    frozen_modules: tuple[str, ...] = ()
    frozen_runs: tuple[FrozenRun, ...] = ()


def own_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> block, of those of the package's own make that a model holds."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Block)}


def needs_batch(model: nn.Module, blocks: Blocks = "auto") -> bool:
    """Whether the blocks can't be told without a forward: some are not the package's own."""
    chosen = own_blocks(model) if blocks == "auto" else choose(model, blocks)
    return not chosen or not all(isinstance(module, Block) for module in chosen.values())


def plan_blocks(
    model: nn.Module,
    blocks: Blocks = "auto",
    *,
    inputs: Inputs = None,
    num_classes: int | None = None,
    allow_reuse: bool = False,
    reads_outputs: bool = True,
) -> NetworkPlan:
    """The blocks of a model, and what learns with them.

    Arguments:
        model: any module; stays as it is.
        blocks: "auto" (the package's own blocks where there are any, and else those of `policy`),
            or names, globs, types; see :func:`choose`.
        inputs: a batch, of which the first few are run through the model, in evaluation mode.
            Needed where :func:`needs_batch` says so.
        num_classes: K; what yields K features at the end is the output layer, and no block.
        allow_reuse: whether a block may run more than once in a forward.
        reads_outputs: whether heads read the blocks' outputs, so that it matters how they lie.

    Raises:
        UserError: unknown or overlapping names, no blocks, a block that runs twice, or outputs
            from which nothing can be learned.
    """
    if not needs_batch(model, blocks):
        chosen = own_blocks(model) if blocks == "auto" else choose(model, blocks)
        plans = [BlockPlan(name, (name,), module) for name, module in chosen.items()]
        return NetworkPlan(plans, shared=_in_several(model, plans))
    if inputs is None:
        raise UserError(
            f"the blocks of {type(model).__name__} are not locallearn's own; give an "
            f"example_input, from which the shapes of their outputs are read."
        )
    inputs, calls = trace_few(model, inputs)
    if blocks != "auto":
        chosen = choose(model, blocks)
        for name in chosen:
            _check_call(name, calls, allow_reuse)
        wiring = watch(model, chosen, inputs, reads_outputs=reads_outputs)
        for error in wiring.unfit.values():
            raise error
        return _plan(model, chosen, wiring)
    members: dict[str, nn.Module] = {}
    unfit = not_of_the_batch(model, inputs, calls)
    for candidate in automatic(model, calls, unfit=unfit, allow_reuse=allow_reuse):
        modules = [calls[name].module for name in candidate]
        members[candidate[0]] = modules[0] if len(modules) == 1 else Chain(modules)
    members, wiring = _with_sound_chains(model, members, inputs, calls[""])
    members, wiring = _without_output_layer(members, wiring, num_classes)
    if not members:
        raise UserError(
            f"{type(model).__name__} has no block in front of its output layer that could learn "
            f"locally. Name the modules that are to: blocks=[...], names as in "
            f"model.named_modules(); or use rule 'bp'."
        )
    return _plan(model, members, wiring)


def _check_call(name: str, calls: dict[str, Call], allow_reuse: bool) -> None:
    if name not in calls:
        raise UserError(
            f"block {name!r} is not called in the model's forward (what it holds may be, one by "
            f"one, or under another name); name modules that are."
        )
    if not calls[name].has_grad:
        raise UserError(
            f"block {name!r} runs under torch.no_grad() in the model's forward, and so can't "
            f"learn; take that out of the forward, or name other blocks."
        )
    if calls[name].num_calls > 1 and not allow_reuse:
        raise reuse_error(calls[name])


def _with_sound_chains(
    model: nn.Module, members: dict[str, nn.Module], inputs: Inputs, whole: Call
) -> tuple[dict[str, nn.Module], Wiring]:
    """The blocks, chains cut down to their first layer where something else reads what lies
    between, and what they read.

    The first module of a chain runs it all, and the others pass on what they get; where that
    changes what the model computes, it is no chain.
    """

    def watched(blocks: dict[str, nn.Module]) -> Wiring | None:
        try:
            wiring = watch(model, blocks, inputs)
        except UserError:
            return None
        is_same = len(wiring.outputs) == len(whole.outputs) and all(
            torch.allclose(a, b.tensor, rtol=1e-4, atol=1e-5, equal_nan=True)
            for a, b in zip(wiring.outputs, whole.outputs, strict=True)
        )
        return wiring if is_same else None

    wiring = watched(members)
    if wiring is None:
        members = {
            name: block if watched({name: block}) else modules_of(block)[0]
            for name, block in members.items()
        }
        wiring = watch(model, members, inputs)
    return members, wiring


def _without_output_layer(
    members: dict[str, nn.Module], wiring: Wiring, num_classes: int | None
) -> tuple[dict[str, nn.Module], Wiring]:
    """The blocks without what makes the logits, and without those that nothing can be read from.

    Of the blocks that no other reads, those that yield K features are the output layer; where
    there are none, and no parameter lies behind the blocks, all that the logits are made of.
    """
    read = {name for block in wiring.of_block.values() for name in block.blocks}
    last = {name for name in members if name not in read and name in wiring.lying}
    output = {name for name in last if wiring.lying[name].view_shape[1] == num_classes}
    if not output and not wiring.of_logits.parameters:
        output = last & wiring.of_logits.blocks
    dropped = output | set(wiring.unfit)
    kept = {name: block for name, block in members.items() if name not in dropped}
    return kept, wiring.without({name: members[name] for name in dropped})


def _plan(model: nn.Module, members: dict[str, nn.Module], wiring: Wiring) -> NetworkPlan:
    order = [name for name, _ in model.named_parameters()]
    held = {name: wiring.held_by(module) for name, module in members.items()}
    readers: dict[str, set[str]] = {}
    for block in members:
        for name in held[block] | wiring.of_block[block].parameters:
            readers.setdefault(name, set()).add(block)
    for name in wiring.of_logits.parameters:
        readers.setdefault(name, set()).add("")
    shared = {name for name, by in readers.items() if len(by) > 1}
    module_names = {module: name for name, module in model.named_modules()}
    plans = []
    for block, module in members.items():
        read, lying = wiring.of_block[block], wiring.lying.get(block)
        joined = read.parameters - held[block] - shared
        plans.append(
            BlockPlan(
                block,
                tuple(module_names[member] for member in modules_of(module)),
                module,
                joined=tuple(name for name in order if name in joined),
                reads_loose=bool(read.parameters),
                layout=lying.layout if lying else None,
                view_shape=lying.view_shape if lying else None,
                inputs_from=tuple(name for name in members if name in read.blocks),
            )
        )
    return NetworkPlan(
        plans,
        shared=tuple(name for name in order if name in shared),
        output=tuple(name for name in order if name in wiring.of_logits.parameters - shared),
    )


def _in_several(model: nn.Module, plans: Sequence[BlockPlan]) -> tuple[str, ...]:
    """Names of the parameters that more than one block holds."""
    count: dict[int, int] = {}
    for plan in plans:
        for parameter in plan.module.parameters():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return tuple(name for name, p in model.named_parameters() if count.get(id(p), 0) > 1)
