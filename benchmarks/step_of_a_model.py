"""Peak activation memory and computing time of a step of any model: a rule beside backpropagation.

python benchmarks/step_of_a_model.py MODEL [--rule RULE] [--batch-size N] [--image-size S]
    [--backend autograd|reference]

Both sides in eager mode, on noise, on the CPU; `locallearn bench` compares with a compiled
backpropagation too, and on CUDA. Time is the processor's and not the clock's, one thread, the two
sides in turn, so that a machine with other work to do tells it as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import torch

from locallearn import LocalLearner, build_model
from locallearn.engine.measuring import peak_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rule", default="lls-mxm")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--backend", default="autograd")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size)
    labels = torch.arange(given.batch_size) % 10
    steps = {}
    for rule in ("bp", given.rule):
        torch.manual_seed(0)
        model = build_model(given.model, num_classes=10, in_channels=3, image_size=given.image_size)
        learner = LocalLearner(
            model,
            rule,
            num_classes=10,
            example_input=images,
            backend=given.backend,
            recalibration_batches=0,
        )
        steps[rule] = functools.partial(learner.step, images, labels)
        steps[rule]()  # makes the optimizers' state
        print(
            f"{rule}: peak of a step {peak_memory_bytes(steps[rule]) / 2**20:.1f} MiB", flush=True
        )
    times: dict[str, list[float]] = {rule: [] for rule in steps}
    for _ in range(given.rounds):
        for rule, step in steps.items():
            start = time.process_time()
            step()
            times[rule].append(time.process_time() - start)
    for rule, seconds in times.items():
        print(
            f"{rule}: {statistics.median(seconds):.2f} s of computing a step "
            f"({min(seconds):.2f} to {max(seconds):.2f})"
        )
    ratio = statistics.median(times["bp"]) / statistics.median(times[given.rule])
    print(f"bp / {given.rule}: {ratio:.2f}")


if __name__ == "__main__":
    main()
