"""Layers in parallel against one process: are weights, buffers, optimizer states and logged losses
the same, bit for bit?

    python benchmarks/bit_identity.py --data-dir DIRECTORY --out FILE.json

Each case trains one epoch of 50 steps on real images (a directory with train/CLASS and test/CLASS),
with dropout and augmentation, in one process of one thread and in 2, 3 and 4 such processes,
through the command line and torchrun, and compares checkpoints, final weights and logged figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from same_run import differences, num_tensors

from locallearn.engine.environment import describe_environment

NUM_STEPS = 50
# Images a step: the paper's 128 would take an hour on two cores.
BATCHES = {"smallconv": 64, "vgg8": 8, "mobilenet-v1": 32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="train/CLASS and test/CLASS")
    parser.add_argument("--cache", type=Path, help="of decoded images")
    parser.add_argument("--models", default="smallconv,vgg8")
    parser.add_argument("--rules", default="lls,lls-mxm,local-losses")
    parser.add_argument("--processes", default="2,3,4")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as work:
        for model in given.models.split(","):
            for rule in given.rules.split(","):
                alone = Path(work) / f"{model}-{rule}-1"
                train(given, model, rule, 1, alone)
                for num in map(int, given.processes.split(",")):
                    shared = Path(work) / f"{model}-{rule}-{num}"
                    train(given, model, rule, num, shared)
                    found = differences(alone, shared)
                    case = {
                        "model": model,
                        "rule": rule,
                        "processes": num,
                        "steps": NUM_STEPS,
                        "batch_size": BATCHES[model],
                        "tensors": num_tensors(alone),
                        "differences": found,
                    }
                    cases.append(case)
                    print(
                        f"{model:12} {rule:13} {num} processes: "
                        f"{'the same' if not found else found[:3]} ({case['tensors']} tensors)",
                        flush=True,
                    )
    if given.out is not None:
        record = {
            "benchmark": "bit_identity",
            "date": time.strftime("%Y-%m-%d"),
            "environment": describe_environment("cpu"),
            "cases": cases,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(case["differences"] for case in cases))


def train(given: argparse.Namespace, model: str, rule: str, num: int, out: Path) -> None:
    """One epoch of so many steps, by so many processes."""
    batch = BATCHES[model]
    command = [sys.executable, "-m", "locallearn"]
    if num > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        command = [sys.executable, *start, "-m", "locallearn"]
    command += f"train --dataset folder --data-dir {given.data_dir} --augment standard".split()
    command += f"--model {model} --rule {rule} --dropout 0.2 --num-threads 1 --epochs 1".split()
    command += f"--batch-size {batch} --limit-train {NUM_STEPS * batch} --limit-test 512".split()
    command += ["--out", str(out), "--quiet"]
    if given.cache is not None:
        command += ["--cache", str(given.cache)]
    if num > 1:
        command += ["--parallel", "layers"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
