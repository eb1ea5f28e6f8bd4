"""How a run may go on: what its record says, against what is asked now; and the command for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from locallearn.distributed import processes as of_processes
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import Processes
from locallearn.distributed.team import ProcessTeam
from locallearn.engine.results import StepResult
from locallearn.engine.sums import EpochSums
from locallearn.engine.team import Team
from locallearn.errors import UserError

RUN = Path("runs/mine")


def _processes(stages: int, replicas: int, **more: Any) -> Processes:
    """Of which nobody is asked anything."""
    nobody = cast(Any, None)
    cpu = torch.device("cpu")
    return Processes(Parallelism(stages, replicas), 0, cpu, nobody, nobody, nobody, nobody, **more)


def _team(stages: int, replicas: int, **options: Any) -> ProcessTeam:
    return ProcessTeam(_processes(stages, replicas), **options)


def test_the_record_says_what_changes_the_result() -> None:
    assert _team(2, 1).describe() == {"parallel": "layers:2"}
    assert _team(2, 1, replay=4).describe() == {"parallel": "layers:2", "replay": 4}
    synchronized = _team(2, 2, synchronize_batch_norm=True).describe()
    assert synchronized == {"parallel": "layers:2,data:2", "sync_batch_norm": True}


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (_team(1, 2, synchronize_batch_norm=True), _team(1, 2), "with --sync-batch-norm. Give it"),
        (_team(1, 2), _team(1, 2, synchronize_batch_norm=True), "without --sync-batch-norm"),
        (Team(), _team(1, 2, synchronize_batch_norm=True), "without --sync-batch-norm. Leave it"),
        (_team(2, 1, replay=4), _team(2, 1), "with --replay 4. Give that"),
        (_team(2, 1, replay=4), _team(2, 1, replay=3), "with --replay 4"),
        (_team(2, 1), _team(2, 1, replay=4), "without --replay. Leave it"),
        (Team(), _team(2, 1, replay=4), "without --replay"),
    ],
)
def test_a_run_does_not_go_on_otherwise(then: Team, now: Team, message: str) -> None:
    with pytest.raises(UserError, match=f"^{RUN} was begun {message}"):
        now.going_on(RUN, then.describe())


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (Team(), Team(), []),
        (_team(2, 1), _team(3, 1), []),
        (_team(2, 1), Team(), []),
        (_team(1, 2, synchronize_batch_norm=True), Team(), []),
        (_team(1, 2, synchronize_batch_norm=True), _team(2, 1), []),
        (_team(1, 2), Team(), ["whole batches from here on; so far by each of 2 parts"]),
        (Team(), _team(2, 3), ["each of 3 parts of a batch from here on; so far by whole"]),
        (_team(2, 1, replay=4), Team(), ["begun with --replay 4; from here on nothing"]),
    ],
)
def test_what_is_otherwise_is_noted(then: Team, now: Team, words: list[str]) -> None:
    notes = now.going_on(RUN, then.describe())
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_the_command_repeats_what_no_record_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_processes, "choose_device", lambda device: "cpu")
    begin = "torchrun --nproc-per-node 2 -m locallearn train --parallel"
    assert _team(2, 1).resume_command(RUN) == f"{begin} layers:2 --resume {RUN}"
    command = _team(2, 1, balance="1,3", replay=4).resume_command(RUN)
    assert command == f"{begin} layers:2 --balance 1,3 --replay 4 --resume {RUN}"
    monkeypatch.setattr(of_processes, "choose_device", lambda device: "cuda")
    team = ProcessTeam(_processes(1, 2, hang_after=90.0), synchronize_batch_norm=True)
    flags = "--sync-batch-norm --device cpu --hang-timeout 90"
    assert team.resume_command(RUN) == f"{begin} data:2 {flags} --resume {RUN}"
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert _processes(1, 2).remedy(RUN, "X") == "Go on from the last checkpoint with `X`."


def test_after_a_resume_means_are_of_what_this_process_has_seen() -> None:
    """Of the last stage, which tells them: 8 images were before, whose sums the first one has."""
    before = {
        "loss": torch.tensor([16.0, 8.0], dtype=torch.float64),
        "correct": torch.tensor([2, 2]),
        "num_images": 8,
        "has_logits": True,
    }
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = StepResult(logits, torch.tensor(0.5), {"one": torch.tensor(1.5)}, {})
    means = []
    for rank in (0, 1):
        team = ProcessTeam(replace(_processes(2, 1), rank=rank))
        sums = EpochSums(["one"], torch.device("cpu"))
        sums.load(team.own_part(before))
        sums.add(result, torch.tensor([0, 1]))
        means.append((sums.mean_loss(), sums.accuracy()[0]))
    assert means == [([1.7, 1.1], 30.0), ([0.5, 1.5], 50.0)]
