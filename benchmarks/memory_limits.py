"""Fine-tuning within a limit of memory: what is chosen, what it holds, what backpropagation would.

    python benchmarks/memory_limits.py [--out benchmarks/results/memory-limits-cpu.json]
        [--models NAME ...] [--limits 64MiB ...] [--family NAME ...] [--family-limit 64MiB]
        [--family-blocks all] [--family-batch N] [--optimizer NAME]

For each model and each limit: `locallearn.engine.budget.choose` picks blocks and batch size; then a
fresh learner takes training steps at that choice on noise, and every allocation of them is counted.
Beside it what backpropagation, plain and checkpointed by block, needs for the same blocks and for
the whole network at the same batch size and optimizer (two small batches, extended linearly).

Then the family, smallest first: which is the largest of it that trains at least its last block and
its output layer within the limit; or, with --family-blocks all, all of its blocks.

Weights are drawn at random and images are noise: memory does not go by either. Bytes are those of
tensors, beyond weights and buffers; no library's own scratch space. On the CPU, one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from locallearn import UserError
from locallearn.data import InputSpec
from locallearn.engine import TrainConfig
from locallearn.engine.budget import (
    Choice,
    MakeLearner,
    choose,
    compare,
    learner_maker,
    parse_memory,
)
from locallearn.engine.budget.needs import as_loaded, batch_of
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json
from locallearn.engine.measuring import Mark, memory_timeline

_MODELS = ("torchvision:mobilenet_v2", "torchvision:resnet18")
_LIMITS = ("64MiB", "128MiB", "256MiB", "512MiB")
_FAMILY = tuple(f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152))
_NUM_CLASSES = 10
_NUM_STEPS = 4
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=_MODELS)
    parser.add_argument("--limits", nargs="*", default=_LIMITS)
    parser.add_argument("--family", nargs="*", default=_FAMILY)
    parser.add_argument("--family-limit", default="64MiB")
    parser.add_argument("--family-blocks")
    parser.add_argument("--family-batch", type=int)
    parser.add_argument("--rule", default="lls-mxm")
    parser.add_argument("--optimizer", default=None)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "environment": describe_environment("cpu"),
        "rule": given.rule,
        "optimizer": given.optimizer or "schedulefree-adamw",
        "image_size": given.image_size,
        "num_classes": _NUM_CLASSES,
        "rows": [],
        "family_limit": given.family_limit,
        "family": [],
    }
    fixed = {"fixed_blocks": given.family_blocks, "fixed_batch": given.family_batch}
    for part, models, limits, fixed_here in (
        ("rows", given.models, given.limits, {}),
        ("family", given.family, [given.family_limit], fixed),
    ):
        for name in models:
            network = _Network(name, given.rule, given.optimizer, given.image_size)
            for limit in limits:
                row = {"model": name, "num_params": network.num_params, "limit": limit}
                row |= network.measured(parse_memory(limit), **fixed_here)
                record[part].append(row)
                print(json.dumps(row), flush=True)
                if given.out is not None:
                    write_json(given.out, record)


class _Network:
    def __init__(self, name: str, rule: str, optimizer: str | None, image_size: int) -> None:
        self._name, self._rule = name, rule
        self._shape = (3, image_size, image_size)
        settings = TrainConfig(
            model=name, rule=rule, optimizer=optimizer, device="cpu", backend="autograd"
        )
        inputs = InputSpec((image_size, image_size), 3, None, (0.0,) * 3, (1.0,) * 3)
        self._make_fresh: MakeLearner = learner_maker(
            settings.resolve(), inputs, _NUM_CLASSES, device=torch.device("cpu")
        )
        # Finding the blocks takes longer than most steps, and is the same for every limit.
        self._make: MakeLearner = functools.cache(self._make_fresh)
        self.num_params = sum(p.numel() for p in self._make(rule, "none").model.parameters())

    def measured(self, limit_bytes: int, **fixed: Any) -> dict[str, Any]:
        """What is chosen within a limit, what it holds, and backpropagation beside it."""
        try:
            choice = choose(
                self._make,
                self._shape,
                _NUM_CLASSES,
                limit_bytes,
                rule=self._rule,
                what=self._name,
                **fixed,
            )
        except UserError as error:
            return {"refused": str(error)}
        peak = self._peak_of_steps(choice)
        compared = compare(
            self._make,
            self._shape,
            _NUM_CLASSES,
            limit_bytes,
            batch_size=choice.batch_size,
            trained_blocks=choice.trained_blocks,
        )
        return {
            "batch_size": choice.batch_size,
            "test_batch_size": choice.test_batch_size,
            "trained": list(choice.trained),
            "num_frozen": len(choice.frozen),
            "peak_of_steps_mib": peak / _MIB,
            "is_within": peak <= limit_bytes and choice.peak_bytes <= limit_bytes,
            "state_mib": choice.step.state_bytes / _MIB,
            "gradients_mib": choice.step.gradient_bytes / _MIB,
            "activations_mib": choice.step.activation_bytes / _MIB,
            "inference_mib": choice.inference_bytes / _MIB,
            "recalibration_mib": choice.recalibration_bytes / _MIB,
            "bp": {
                name: {
                    "peak_mib": need["peak_bytes"] / _MIB,
                    "largest_batch": need["largest_batch"],
                }
                for name, need in compared.to_json().items()
            },
        }

    def _peak_of_steps(self, choice: Choice) -> int:
        """Of several steps of a learner that `choose` has not seen."""
        learner = self._make_fresh(self._rule, choice.trained_blocks)
        images, labels = batch_of(self._shape, choice.batch_size, _NUM_CLASSES, "cpu")

        def steps(mark: Mark) -> None:
            for _ in range(_NUM_STEPS):
                learner.step(as_loaded(images), labels.clone())

        return memory_timeline(steps).peak_bytes


if __name__ == "__main__":
    main()
