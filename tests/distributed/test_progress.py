from __future__ import annotations

import time
from pathlib import Path

from tests.distributed.processes import in_processes
from tests.distributed.training import Silence

from locallearn.cli.console import _loads
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import joined
from locallearn.distributed.team import ProcessTeam
from locallearn.engine import Snapshot, TrainConfig, Trainer


class _Slow(Silence):
    """Makes steps long enough for the ranks to tell each other of them."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def wants_progress(self) -> bool:
        return True

    def on_progress(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        time.sleep(0.15)


def _last_snapshot(out: str) -> Snapshot:
    settings = TrainConfig(limit_train=160, limit_test=32, batch_size=16, epochs=2, width=0.25)
    observer = _Slow()
    with joined(Parallelism(2, 1), "cpu", 60) as processes:
        Trainer.start(settings, Path(out), observer, team=ProcessTeam(processes)).fit()
    return observer.snapshots[-1]


def test_the_first_process_knows_the_loss_and_each_ones_load(tmp_path: Path) -> None:
    first, _ = in_processes(2, _last_snapshot, str(tmp_path / "run"))
    assert (first.epoch, first.step) == (2, 10)
    assert first.loss > 0  # of the output, which the other process has
    assert first.accuracy > 0
    assert len(first.loads) == 2
    assert all(0 < load <= 1 for load in first.loads)


def test_the_bar_shows_loads_of_several_processes() -> None:
    assert _loads(Snapshot(1, 2, 3, 4, 1.5, 40.0, 1000.0, (0.984, 0.71))) == "  load 98 71 %"
    assert _loads(Snapshot(1, 2, 3, 4, 1.5, 40.0, 1000.0)) == ""
