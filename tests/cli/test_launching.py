"""What the command line makes of the processes that torchrun, or another launcher, started."""

from __future__ import annotations

from pathlib import Path

import pytest

from locallearn.cli import main
from locallearn.cli.launching import Sharing, num_started, sharing_work
from locallearn.engine.team import Team
from locallearn.errors import Silent, UserError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _started(monkeypatch: pytest.MonkeyPatch, rank: int, num: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(num))


def test_one_process_of_a_launcher_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _started(monkeypatch, 0, 1)
    with sharing_work(Sharing(), "cpu") as team:
        assert type(team) is Team


def test_several_must_say_how_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    _started(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="started 2 processes"), sharing_work(Sharing(), "cpu"):
        pass
    _started(monkeypatch, 1, 2)
    with pytest.raises(Silent), sharing_work(Sharing(), "cpu"):
        pass


@pytest.mark.parametrize(
    "command", [["finetune", "--from", "nowhere"], ["reproduce", "table1", "--dry-run"]]
)
def test_what_trains_in_one_process_refuses_several(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _started(monkeypatch, 0, 2)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: torchrun has started 2 processes, and `locallearn {command[0]}")
    _started(monkeypatch, 1, 2)
    assert main(command) == 2
    assert capsys.readouterr().err == ""
    assert list(Path().iterdir()) == []


def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_started() == 1
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert num_started() == 1  # without RANK it is another's
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE=two"):
        num_started()
