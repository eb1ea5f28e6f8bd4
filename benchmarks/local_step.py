"""A LocalLearner step against a plain PyTorch loop that does the same block-local arithmetic.

What it answers: does the library's machinery (standing in for forwards, the closed-form head, the
learner's own bookkeeping) cost time over a loop written by hand? The loop is channels-last eager
PyTorch with autograd through pooling and head, and the same optimizer for each block; backprop of
the same network stands beside them.

First a gate: all sides' losses must agree over the first steps. Then the sides in turn (A B C A B
C ...), median and spread, and the ratio pair by pair.

    python benchmarks/local_step.py --json benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner, build_model
from locallearn.engine.environment import describe_environment
from locallearn.engine.optimizers import optimizer_factory

Step = Callable[[Tensor, Tensor], list[Tensor]]


def plain_step(model: nn.Module, learner: LocalLearner) -> Step:
    """The same step, by hand. The learner lends the order of its blocks and their bases."""
    blocks = [model.get_submodule(name) for name in learner.block_names]
    bases = [head.basis for head in learner.heads]
    make = optimizer_factory("schedulefree-adamw", lr=None, weight_decay=0.0)
    optimizers = [make(list(block.parameters())) for block in blocks]
    last = make(list(model.classifier.parameters()))
    for optimizer in (*optimizers, last):
        optimizer.train()

    def step(x: Tensor, labels: Tensor) -> list[Tensor]:
        losses = []
        for block, basis, optimizer in zip(blocks, bases, optimizers, strict=True):
            if x.ndim == 4 and isinstance(getattr(block, "linear", None), nn.Linear):
                x = model.pool(x).flatten(1)
            layer = block.conv if hasattr(block, "conv") else block.linear
            h = F.leaky_relu(block.norm(layer(x)), 0.01, inplace=True)
            if h.ndim == 4:
                p = F.adaptive_avg_pool2d(h, block.latent_size).flatten(1)
            else:
                p = F.adaptive_avg_pool1d(h, block.latent_size)
            loss = F.cross_entropy(F.normalize(p, dim=1) @ basis.T / 0.5, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            x = block.pool(h.detach())
        loss = F.cross_entropy(model.classifier(x), labels)
        last.zero_grad()
        loss.backward()
        last.step()
        return [loss.detach(), *losses]

    return step


def learner_step(learner: LocalLearner) -> Step:
    def step(images: Tensor, labels: Tensor) -> list[Tensor]:
        result = learner.step(images, labels)
        return [result.loss, *result.block_losses.values()]

    return step


def spread(values: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "p20": cut[1], "p80": cut[7]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smallconv")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=60, help="times each side runs")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (arguments.batch_size,))
    model = build_model(arguments.model)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    learner = LocalLearner(model, "lls")
    twin.to(memory_format=torch.channels_last).train()
    sides: dict[str, Step] = {
        "learner": learner_step(learner),
        "plain loop": plain_step(twin, learner),
        "backprop": learner_step(LocalLearner(third, "bp")),
    }

    for number in range(3):
        ours, theirs = sides["learner"](images, labels), sides["plain loop"](images, labels)
        sides["backprop"](images, labels)
        for a, b in zip(ours, theirs, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-3):
                print(f"gate red at step {number}: {a.item()} against {b.item()}", file=sys.stderr)
                return 1

    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            step(images, labels)
            times[name].append(1000 * (time.perf_counter() - began))

    rows = []
    for name, values in times.items():
        ratios = [t / o for t, o in zip(values, times["learner"], strict=True)]
        rows.append({"side": name, "step_time_ms": spread(values), "over_learner": spread(ratios)})
        ms, ratio = rows[-1]["step_time_ms"], rows[-1]["over_learner"]
        print(
            f"{name:12} {ms['median']:7.1f} ms (p20 {ms['p20']:.1f}, p80 {ms['p80']:.1f})   "
            f"{ratio['median']:.2f}x the learner's (p20 {ratio['p20']:.2f}, p80 {ratio['p80']:.2f})"
        )
    if arguments.json:
        record = {
            "command": "python benchmarks/local_step.py " + " ".join(sys.argv[1:]),
            "gate": "green",
            "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
            "num_threads": torch.get_num_threads(),
            "environment": describe_environment("cpu"),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
