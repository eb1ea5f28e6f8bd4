"""Which blocks of a model stay as they are, and what stays as it is with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn

from locallearn.engine.blocks.choosing import BlockChoice, Blocks, fits_glob, split_blocks
from locallearn.engine.blocks.frozen_runs import find_runs
from locallearn.engine.blocks.planning import BlockPlan, NetworkPlan
from locallearn.engine.blocks.trace import Inputs, few, num_inputs
from locallearn.engine.blocks.wiring import Wiring, watch
from locallearn.errors import UserError, unknown_name

ALL, NONE = "all", "none"


def learn_all(trained: Blocks | None) -> bool:
    """Whether the choice says that every block learns."""
    return trained is None or (isinstance(trained, str) and trained.strip() == ALL)


def freeze(
    model: nn.Module, plan: NetworkPlan, trained: Blocks, inputs: Inputs, group_size: int = 1
) -> NetworkPlan:
    """The plan with all but some of its blocks frozen.

    A frozen block's parameters stay as they are, those too that a learning block holds as well. Of
    what lies in no block, what makes the logits learns; what a frozen block reads does not; the
    rest learns with the block that reads it. A module in no block, such as a norm, stays in
    evaluation mode where frozen blocks alone read what it makes.

    Arguments:
        model: any module; stays as it is.
        plan: all of its blocks.
        trained: which are to learn: names, a stage's too, which means the blocks it holds; globs;
            types; "none".
        inputs: a batch, of which the first few are run through the model, in evaluation mode.
        group_size: so many blocks at a time learn together, under the name of the last.

    Raises:
        UserError: names of no block, or one of a group whose last block is not to learn.
    """
    learning = _chosen(plan.blocks, trained)
    for first in range(0, len(plan.blocks), group_size):
        group = plan.blocks[first : first + group_size]
        named = [block.name for block in group if block.name in learning]
        if group[-1].name in learning:
            learning |= {block.name for block in group}
        elif named:
            raise UserError(
                f"block {named[0]!r} learns together with {group[-1].name!r} (group_blocks="
                f"{group_size}), which is not to learn; name that one, or leave out group_blocks."
            )
    blocks = [dataclasses.replace(b, is_frozen=b.name not in learning) for b in plan.blocks]
    loose = _loose_modules(model, blocks)
    wiring = _watch(model, blocks, inputs, loose)
    frozen = [block for block in blocks if block.is_frozen]
    held = {name for block in frozen for name in wiring.held_by(block.module)}
    in_blocks = {name for block in blocks for name in wiring.held_by(block.module)}
    read = {name for block in frozen for name in wiring.of_block[block.name].parameters}
    still = held | (read - in_blocks - wiring.of_logits.parameters)
    by_learning = set(wiring.of_logits.modules)
    for block in blocks:
        seen = wiring.of_block[block.name]
        if not block.is_frozen:
            by_learning |= seen.modules
            block.joined = tuple(name for name in block.joined if name not in still)
            block.reads_loose = bool(seen.parameters - still)
    by_frozen = {name for block in frozen for name in wiring.of_block[block.name].modules}
    evaluating = by_frozen - by_learning
    for block in frozen:
        evaluating |= _names_within(model, block)
    modules = [member for block in frozen for member in block.members]
    # Without values there is no telling what gives the same; such a model is only counted.
    has_values = not any(p.is_meta for p in model.parameters())
    runs = []
    if frozen and has_values:
        runs = find_runs(model, inputs, modules, evaluating & set(loose))
    return dataclasses.replace(
        plan,
        blocks=blocks,
        shared=tuple(name for name in plan.shared if name not in still),
        output=tuple(name for name in plan.output if name not in still),
        frozen_parameters=tuple(name for name, _ in model.named_parameters() if name in still),
        frozen_runs=tuple(runs),
        frozen_modules=tuple(name for name, _ in model.named_modules() if name in evaluating),
    )


def _chosen(blocks: Sequence[BlockPlan], trained: Blocks) -> set[str]:
    """Names of the blocks that are meant."""
    choices: Iterable[BlockChoice]
    if isinstance(trained, str):
        choices = [] if trained.strip() == NONE else split_blocks(trained)
        if not choices and trained.strip() != NONE:
            raise UserError(
                'trained_blocks is empty; name blocks, or say "all", or "none" to train the '
                "output layer alone."
            )
    else:
        choices = [trained] if isinstance(trained, type) else trained
    return {name for choice in choices for name in _matching(blocks, choice)}


def _matching(blocks: Sequence[BlockPlan], choice: BlockChoice) -> list[str]:
    names = [block.name for block in blocks]
    if isinstance(choice, type):
        found = [b.name for b in blocks if any(isinstance(m, choice) for m in b.members)]
        return found or _nothing(f"type:{choice.__name__}", names)
    if not isinstance(choice, str):
        raise UserError(
            f"trained_blocks holds {choice!r}; names, globs and module types are expected."
        )
    if choice.startswith("type:"):
        kind = choice.removeprefix("type:")
        found = [b.name for b in blocks if any(type(m).__name__ == kind for m in b.members)]
    elif any(character in choice for character in "*?["):
        found = [name for name in names if fits_glob(name, choice)]
    elif choice in names:
        found = [choice]
    else:
        found = [name for name in names if name.startswith(choice + ".")]
    return found or _nothing(choice, names)


def _nothing(choice: str, names: Sequence[str]) -> list[str]:
    raise unknown_name("block to train", choice, names)


def _names_within(model: nn.Module, block: BlockPlan) -> set[str]:
    """Names of a block's modules, and of all that they hold."""
    within = {module for member in block.members for module in member.modules()}
    return {name for name, module in model.named_modules() if module in within}


def _loose_modules(model: nn.Module, blocks: Sequence[BlockPlan]) -> dict[str, nn.Module]:
    """Name -> module, of those that lie in no block and hold none."""
    members = {module for block in blocks for module in block.members}
    inside = {inner for member in members for inner in member.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if module not in inside and members.isdisjoint(module.modules())
    }


def _watch(
    model: nn.Module, blocks: Sequence[BlockPlan], inputs: Inputs, loose: dict[str, nn.Module]
) -> Wiring:
    members = {block.name: block.module for block in blocks}
    first = few(inputs)
    try:
        return watch(model, members, first, reads_outputs=False, loose=loose)
    except UserError:
        if num_inputs(first) == num_inputs(inputs):
            raise
    return watch(model, members, inputs, reads_outputs=False, loose=loose)
