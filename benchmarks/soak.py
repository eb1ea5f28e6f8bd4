"""Memory over 100,000 training steps on one image each, with an inference every 100 steps.

python benchmarks/soak.py [--steps N] [--every N] [--parts DIR] [--out FILE.json] [--plot FILE.png]
python benchmarks/soak.py --only SIDE [--steps N] [--every N] [--out FILE.json]

Sides, each in a process of its own, all at once: `learner.step` with sgd by autograd, with
schedulefree-adamw in closed form (reference kernels), and `learner.local_step`, in closed form too.
A small network (a convolutional block, a linear block, a linear classifier) on noise, one thread.
Every 1,000 steps, after a garbage collection: the process' resident memory, the bytes of all live
tensors' storages, how many tensors, and how many objects Python's collector tracks (what was there
before the learner was built is left out of the last three). The first tenth is a warm-up; "growth"
is the mean over the last tenth minus that over the tenth after the warm-up, "slope" a straight line
through all after it. DIR holds what the sides have written so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_atomically, write_json
from locallearn.models import ConvBlock, LinearBlock

SIDES: dict[str, dict[str, Any]] = {
    "sgd, autograd": {"optimizer": "sgd", "lr": 1e-3, "backend": "autograd"},
    "schedulefree-adamw, closed form": {"lr": 1e-3, "backend": "reference"},
    "schedulefree-adamw, local_step": {"lr": 1e-3, "backend": "reference"},
}
COUNTED = ("rss_mib", "tensor_kib", "num_tensors", "num_objects")
WARM_UP_SHARE = 0.1
INFER_EVERY = 100


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBlock(1, 8, stride=2, latent_size=2)
        self.linear = LinearBlock(8 * 4 * 4, 32, latent_size=32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.linear(self.conv(images).flatten(1)))
        return logits


def build(side: str) -> LocalLearner:
    torch.manual_seed(0)
    return LocalLearner(Net(), "lls", num_classes=10, **SIDES[side])


def take_step(side: str, learner: LocalLearner, images: Tensor, labels: Tensor) -> None:
    if not side.endswith("local_step"):
        learner.step(images, labels)
        return
    with learner.local_step(labels):
        F.cross_entropy(learner.model(images), labels).backward()  # type: ignore[no-untyped-call]
    learner.optimizers[""].step()
    learner.optimizers[""].zero_grad()


def look() -> dict[str, float]:
    """What is alive now; see the top of this file."""
    gc.collect()
    objects = gc.get_objects()
    # By the type: asking some lazy module's object for its class would import the module.
    tensors = [o for o in objects if issubclass(type(o), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mib": pages * 4096 / 2**20,
        "tensor_kib": sum(storages.values()) / 1024,
        "num_tensors": len(tensors),
        "num_objects": len(objects),
    }


def soak(side: str, num_steps: int, every: int, out: Path | None = None) -> dict[str, Any]:
    """The record of one side: {"steps": [...], "rss_mib": [...], ...}; written as it grows."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    learner = build(side)
    generator = torch.Generator().manual_seed(0)
    record: dict[str, Any] = {"side": side, "steps": []} | {name: [] for name in COUNTED}
    began = time.process_time()
    for step in range(1, num_steps + 1):
        images = torch.randn(1, 1, 8, 8, generator=generator)
        labels = torch.randint(10, (1,), generator=generator)
        take_step(side, learner, images, labels)
        if step % INFER_EVERY == 0:
            assert torch.isfinite(learner(images)).all()
        if step % every == 0:
            record["steps"].append(step)
            for name, value in look().items():
                record[name].append(value)
                record |= {f"{name}_{key}": v for key, v in judge(record, name).items()}
            record["cpu_ms_per_step"] = 1000 * (time.process_time() - began) / step
            if out:
                write_json(out, record)
    return record


def judge(record: dict[str, Any], name: str) -> dict[str, float]:
    """Growth after the warm-up, and its slope for 1,000 steps."""
    first = round(WARM_UP_SHARE * len(record["steps"]))
    steps, values = record["steps"][first:], record[name][first:]
    tenth = max(1, first)
    growth = statistics.mean(values[-tenth:]) - statistics.mean(values[:tenth])
    slope = statistics.linear_regression(steps, values).slope if len(steps) > 1 else 0.0
    return {"growth": growth, "slope_per_1000_steps": 1000 * slope}


def plot(records: list[dict[str, Any]], path: Path) -> None:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"rss_mib": "resident memory, MiB", "tensor_kib": "live tensors, KiB"}
    titles |= {"num_tensors": "live tensors", "num_objects": "Python objects"}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, name in zip(axes.flat, COUNTED, strict=True):
        for record in records:
            axis.plot(record["steps"], record[name], label=record["side"])
        axis.set_title(titles[name])
        axis.set_ylim(0, 1.25 * max(max(record[name]) for record in records))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("training steps, one image each")
    axes[0, 0].legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--only", choices=SIDES, help="run this side here, in this process")
    parser.add_argument("--parts", type=Path, help="a directory; a temporary one by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.only:
        records = [soak(given.only, given.steps, given.every, given.out)]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            parts = given.parts or Path(temporary)
            records = _in_processes(given.steps, given.every, parts)
        if given.out:
            result = {
                "command": f"python benchmarks/soak.py --steps {given.steps}",
                "environment": describe_environment("cpu"),
                "records": records,
            }
            write_json(given.out, result)
    for record in records:
        print(f"{record['side']}: {record['cpu_ms_per_step']:.2f} ms of computing a step")
        for name in COUNTED:
            growth, slope = record[f"{name}_growth"], record[f"{name}_slope_per_1000_steps"]
            last = record[name][-1]
            print(f"  {name}: {last:.2f}, growth {growth:+.3f}, slope {slope:+.5f} / 1000 steps")
    if given.plot:
        plot(records, given.plot)


def _in_processes(num_steps: int, every: int, parts: Path) -> list[dict[str, Any]]:
    parts.mkdir(parents=True, exist_ok=True)
    paths = [parts / f"side-{number}.json" for number in range(len(SIDES))]
    running = []
    for side, path in zip(SIDES, paths, strict=True):
        words = ["--only", side, "--steps", str(num_steps), "--every", str(every)]
        words += ["--out", str(path)]
        running.append(subprocess.Popen([sys.executable, __file__, *words]))
    for process in running:
        if process.wait() != 0:
            raise SystemExit("a side has failed; see above")
    return [json.loads(path.read_text()) for path in paths]


if __name__ == "__main__":
    main()
