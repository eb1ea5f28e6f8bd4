"""Steps to be measured: a network and a rule on noise, alone or beside others like them."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from locallearn.engine.allocator import keep_freed_memory
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.models import build_model, is_foreign
from locallearn.models.sources import check_logits
from locallearn.rules import parse_rule

_SEED = 0
_START_SECONDS = 300  # compiling, too


@dataclass(frozen=True)
class MeasuredSteps:
    """What is measured. Meanings and units are those of the command line's help."""

    model: str
    rule: str
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    precision: str
    device: str
    backend: str
    num_threads: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """Noise (N, C, H, W), channels-last, and labels (N,)."""
        generator = torch.Generator().manual_seed(_SEED)
        images = torch.randn(self.batch_size, *self.image_shape, generator=generator)
        labels = torch.randint(self.num_classes, (self.batch_size,), generator=generator)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        return images, labels.to(self.device)

    def learner(self, rule: str) -> LocalLearner:
        """A fresh one; batches of every size are normalised by themselves."""
        channels, *size = self.image_shape
        images, _ = self.batch()
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(_SEED)
            network = build_model(
                self.model,
                num_classes=self.num_classes,
                in_channels=channels,
                image_size=(size[0], size[1]),
            ).to(self.device)
            if is_foreign(self.model):
                check_logits(self.model, network, images[:2], self.num_classes)
            return LocalLearner(
                network,
                parse_rule(rule),
                num_classes=self.num_classes,
                example_input=images[:3],
                precision=self.precision,
                backend=self.backend,
                recalibration_batches=0,
                batch_statistics_from=1,
            )


@contextlib.contextmanager
def steps_beside(steps: MeasuredSteps, num_processes: int) -> Iterator[None]:
    """Within: so many other processes of this host take these steps, one after another.

    Raises:
        UserError: one of them could not.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_take_steps, args=(steps, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(_stop, process)
            connections.append(ours)
        for connection in connections:
            _wait_until_begun(connection)
        yield


def _wait_until_begun(connection: Connection) -> None:
    try:
        if connection.poll(_START_SECONDS):
            connection.recv()
            return
        problem = f"had not taken its first steps after {_START_SECONDS} s"
    except EOFError:
        problem = "ended before its first steps"
    raise UserError(f"a process that was to work beside this one {problem}. Leave out --beside.")


def _stop(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join()


def _take_steps(steps: MeasuredSteps, connection: Connection) -> None:
    """In a process of its own, until it is killed, or the one that began it has ended."""
    torch.set_num_threads(steps.num_threads)
    if steps.device == "cpu":
        keep_freed_memory()
    learner = steps.learner(steps.rule)
    images, labels = steps.batch()
    for _ in range(2):
        learner.step(images, labels)
    connection.send(None)
    while not connection.poll():  # readable, at its end, once the other side is gone
        learner.step(images, labels)
