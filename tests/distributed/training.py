"""Runs of several processes, through the very loop that the command line runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.processes import in_processes

from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import joined
from locallearn.distributed.team import ProcessTeam
from locallearn.engine import Interrupted, TrainConfig, Trainer


class Silence:
    """An observer."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def train_in_processes(
    parallel: str,
    num: int,
    out: Path,
    balance: str | None = None,
    *,
    replay: int | None = None,
    **settings: Any,
) -> None:
    """A run in ``out``, by so many processes; settings of one that is to be resumed are empty."""
    in_processes(num, _train, parallel, num, str(out), balance, replay, settings)


def _train(
    parallel: str,
    num: int,
    out: str,
    balance: str | None,
    replay: int | None,
    settings: dict[str, Any],
) -> None:
    device = settings.get("device", "cpu")
    with joined(Parallelism.parse(parallel, num), device, 120) as processes:
        fit(Path(out), settings, ProcessTeam(processes, balance=balance, replay=replay))


def train_alone(out: Path, **settings: Any) -> None:
    """The same in this process."""
    fit(out, settings, None)


def fit(out: Path, settings: dict[str, Any], team: Any) -> None:
    """Start, or without settings resume, and train; ``stop_after`` so many steps, where given."""
    settings = dict(settings)
    stop_after = settings.pop("stop_after", None)
    if settings:
        trainer = Trainer.start(TrainConfig(**settings), out, Silence(), team=team)
    else:
        trainer = Trainer.resume(out, Silence(), team=team)
    if stop_after is not None:
        step = trainer.team.step

        def stopping(images: Any, labels: Any) -> Any:
            if trainer.step + 1 == stop_after:
                trainer.request_stop(15)
            return step(images, labels)

        trainer.team.step = stopping
    try:
        trainer.fit()
    except Interrupted:
        assert stop_after is not None
