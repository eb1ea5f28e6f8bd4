"""What the guides in docs/ tell a reader to do works, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from locallearn.cli import main

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("quick-start", "own-model")}


def programs(name: str) -> list[str]:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def commands(name: str) -> list[str]:
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    return re.findall(r"^ {4}(\S.*)$", prose, re.M)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's, with the file that the quick start has her write."""
    (code,) = [code for code in programs("quick-start") if code.startswith("# mynet.py\n")]
    (tmp_path / "mynet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.usefixtures("directory", "one_thread")
def test_programs_of_the_quick_start_run_and_its_network_learns() -> None:
    names = run_programs("quick-start")
    assert names["learner"].block_names == ["conv", "stage.0", "stage.1"]
    assert "# ['conv', 'stage.0', 'stage.1']" in TEXTS["quick-start"]
    assert names["accuracy"] > 0.9


@pytest.mark.usefixtures("one_thread")
def test_programs_of_own_model_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    run_programs("own-model")
    shown = re.findall(r"^print\(.*\)  # (.*)$", TEXTS["own-model"], re.M)
    said = capsys.readouterr().out.splitlines()
    assert len(shown) == len(said) > 0
    for expected, line in zip(shown, said, strict=True):
        begin, dots, end = expected.partition("..., ")
        assert line == expected if not dots else line.startswith(begin) and line.endswith(end)


@pytest.mark.usefixtures("one_thread")
def test_the_program_of_early_exit_saves_without_losing() -> None:
    torch.manual_seed(0)
    names = run_programs("early-exit")
    whole = names["learner"].predict(names["images"][names["test"]])
    right = (whole.classes == names["labels"][names["test"]]).double().mean()
    assert names["accuracy"] > right - 0.05
    assert names["share_leaving_early"] > 0.2


def run_programs(name: str) -> dict:
    names: dict = {}
    for code in programs(name):
        exec(code, names)
    return names


@pytest.mark.usefixtures("directory", "one_thread")
@pytest.mark.parametrize("name", TEXTS)
def test_commands_run_and_print_what_is_shown(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ""
    for command in commands(name):
        program, *arguments = shlex.split(command)
        if command == "pip install .":
            continue
        assert program == "locallearn"
        assert main(arguments) == 0, (command, capsys.readouterr().err)
        said += capsys.readouterr().out
    lines = [line.rstrip() for line in said.splitlines()]
    for shown in re.findall(r"```text\n(.*?)```", TEXTS[name], re.DOTALL):
        for line in shown.splitlines():
            assert line in lines


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", TEXTS[name]):
        assert (ROOT / "docs" / target).exists(), target
