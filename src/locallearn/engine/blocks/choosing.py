"""Which modules of a model a user means by names, globs and types."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from locallearn.errors import UserError, unknown_name

BlockChoice = str | type[nn.Module]
Blocks = BlockChoice | Sequence[BlockChoice]
"""What can be said of the blocks of a model; see :func:`choose`."""


def parse_blocks(text: str) -> Blocks:
    """What a user writes on one line: "auto", or names, globs and "type:NAME" with commas."""
    return "auto" if text.strip() == "auto" else split_blocks(text)


def split_blocks(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """Name -> module, as chosen, in the order of ``named_modules``.

    Arguments:
        model: any module.
        blocks: names as in ``named_modules()``; globs, whose ``*`` and ``?`` stay within a part of
            a name between dots ("layer*.?"); module types, or their names ("type:Bottleneck"), of
            which the outermost modules are meant. One, a sequence, or a string with commas.

    Raises:
        UserError: what matches nothing, or a block inside another.
    """
    if isinstance(blocks, str):
        blocks = split_blocks(blocks)
    choices = [blocks] if isinstance(blocks, type) else blocks
    if not choices:
        raise UserError("blocks=[] names no block; leave it out, or use rule 'bp'.")
    modules = {name: module for name, module in model.named_modules() if module is not model}
    found: set[str] = set()
    for choice in choices:
        found |= set(_matching(choice, modules))
    ordered = [name for name in modules if name in found]
    for outer in ordered:
        for inner in ordered:
            if inner != outer and _is_inside(inner, outer):
                raise UserError(f"block {inner!r} lies inside block {outer!r}; name one of them.")
    return {name: modules[name] for name in ordered}


def _matching(choice: BlockChoice, modules: dict[str, nn.Module]) -> list[str]:
    if not isinstance(choice, str | type):
        raise UserError(f"blocks holds {choice!r}; names, globs and module types are expected.")
    if isinstance(choice, type):
        names = [name for name, module in modules.items() if isinstance(module, choice)]
        what = f"module of type {choice.__name__}"
    elif choice.startswith("type:"):
        kind = choice.removeprefix("type:")
        names = [name for name, module in modules.items() if type(module).__name__ == kind]
        what = f"module of type {kind}"
        if not names:
            raise unknown_name("module type", kind, {type(m).__name__ for m in modules.values()})
    elif any(character in choice for character in "*?["):
        names = [name for name in modules if fits_glob(name, choice)]
        what = f"module whose name matches {choice!r}"
    else:
        names = [choice] if choice in modules else []
        what = f"module {choice!r}"
    if not names:
        raise UserError(f"the model has no {what}; see model.named_modules().")
    if isinstance(choice, type) or choice.startswith("type:"):
        return [n for n in names if not any(n != o and _is_inside(n, o) for o in names)]
    return names


def fits_glob(name: str, glob: str) -> bool:
    """Whether a module's name matches, ``*`` and ``?`` staying between dots."""
    parts, patterns = name.split("."), glob.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _is_inside(inner: str, outer: str) -> bool:
    return inner.startswith(outer + ".")
