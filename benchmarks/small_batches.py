"""Small batches normalised by themselves or by running statistics, at equal images seen.

python benchmarks/small_batches.py --data-dir DIR [--batch-sizes 1,2,4,8] [--lr RATE]
    [--optimizer NAME] [--rule RULE] [--images N] [--horizon IMAGES] [--seed N]

MNIST (DIR holds it as torchvision lays it out), SmallConv at a quarter of its width, one pass over
N images. For each batch size and policy, in percent: right answers before the update over the last
third of the images; right answers on the first 1,000 test images by the running statistics as they
are, and by statistics re-estimated on 1,024 training images in batches of 128. One thread,
autograd.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torchvision.datasets import MNIST

from locallearn import LocalLearner, build_model
from locallearn.engine import statistics

_BY_THE_BATCH, _BY_RUNNING = 1, 1_000


def load(data_dir: str, *, train: bool, number: int) -> tuple[Tensor, Tensor]:
    data = MNIST(data_dir, train=train)
    return (data.data[:number].float() - 33.3)[:, None] / 78.6, data.targets[:number]


def measure(
    given: argparse.Namespace, batch_size: int, least: int, train: tuple[Tensor, Tensor]
) -> str:
    images, labels = train
    torch.manual_seed(given.seed)
    order = torch.randperm(len(images))[: given.images]
    model = build_model("smallconv", num_classes=10, in_channels=1, image_size=28, width=0.25)
    learner = LocalLearner(
        model,
        given.rule,
        optimizer=given.optimizer,
        lr=given.lr,
        backend="autograd",
        batch_statistics_from=least,
        recalibration_batches=0,
    )
    flags = []
    began = time.process_time()
    batches = [part for part in order.split(batch_size) if len(part) == batch_size]
    for part in batches:
        result = learner.step(images[part], labels[part])
        flags.append(result.logits.argmax(dim=1) == labels[part])
    step_time_ms = 1000 * (time.process_time() - began) / len(batches)
    before = 100 * torch.cat(flags)[-given.images // 3 :].float().mean().item()
    test_images, test_labels = load(given.data_dir, train=False, number=1000)

    def test_accuracy() -> float:
        return 100 * (learner(test_images).argmax(dim=1) == test_labels).float().mean().item()

    as_they_are = test_accuracy()
    learner.recalibrate([images[part] for part in order[:1024].split(128)])
    return (
        f"before the update {before:.1f}, test by running statistics {as_they_are:.1f}, "
        f"by re-estimated ones {test_accuracy():.1f}; {step_time_ms:.1f} ms of computing a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--batch-sizes", default="1,2,4,8")
    parser.add_argument("--rule", default="lls-mxm")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--horizon", type=float, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    statistics.USUAL_BATCH = given.horizon / 10  # at BatchNorm's usual momentum, 0.1
    train = load(given.data_dir, train=True, number=20_000)
    for batch_size in map(int, given.batch_sizes.split(",")):
        for policy, least in (("running", _BY_RUNNING), ("batch", _BY_THE_BATCH)):
            if batch_size == 1 and policy == "batch":
                continue  # BatchNorm1d has no variance of one value
            row = measure(given, batch_size, least, train)
            print(f"batch {batch_size}, {policy}: {row}", flush=True)


if __name__ == "__main__":
    main()
