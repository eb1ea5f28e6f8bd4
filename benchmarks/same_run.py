"""Whether two runs came to the same, bit for bit: what tests and benchmarks of several processes
hold them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from locallearn.engine.run import RunDirectory, load_checkpoint

# Of a checkpoint: how long it took, and where and by how many processes it was made.
_MAY_DIFFER = ("config", "total_seconds", "train_seconds", "rng", "cuda_rng")
_TIMES = ("images_per_second", "step_time_ms")


def differences(first: Path, second: Path) -> list[str]:
    """What differs between two run directories: weights, buffers, optimizer states, logged losses
    and accuracies; nothing of two that are the same."""
    found: list[str] = []
    one, two = (load_checkpoint(RunDirectory(path).checkpoint_path) for path in (first, second))
    for state in (one, two):
        for name in _MAY_DIFFER:
            state.pop(name)
        for row in state["rows"]:
            for name in _TIMES:
                row.pop(name)
    _compare(one, two, "checkpoint", found)
    weights = [RunDirectory(path).model_path for path in (first, second)]
    if weights[0].exists() != weights[1].exists():
        found.append("only one has final weights")
    elif weights[0].exists():
        from safetensors.torch import load_file

        _compare(*(load_file(path) for path in weights), "final weights", found)
    return found


def num_tensors(run: Path) -> int:
    """How many tensors of a run's checkpoint are compared."""
    leaves = torch.utils._pytree.tree_leaves(load_checkpoint(RunDirectory(run).checkpoint_path))
    return sum(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _compare(one: Any, two: Any, where: str, found: list[str]) -> None:
    if type(one) is not type(two):
        found.append(f"{where}: {type(one).__name__} and {type(two).__name__}")
    elif isinstance(one, dict):
        if list(one) != list(two):
            found.append(f"{where}: other entries")
        for key in one.keys() & two.keys():
            _compare(one[key], two[key], f"{where}/{key}", found)
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            found.append(f"{where}: other lengths")
        for number, pair in enumerate(zip(one, two, strict=False)):
            _compare(*pair, f"{where}/{number}", found)
    elif isinstance(one, torch.Tensor):
        alike = one.shape == two.shape and one.dtype == two.dtype
        # The bytes, to which NaN equals itself and 0 is not -0.
        flat = [t.contiguous().flatten().view(torch.uint8) for t in (one, two)] if alike else []
        if not alike or not torch.equal(*flat):
            found.append(where)
    elif one != two:
        found.append(f"{where}: {one} and {two}")
