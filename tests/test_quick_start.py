"""What docs/quick-start.md tells a reader to do works as it stands there, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from locallearn.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "quick-start.md").read_text()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, as the reader's, with the files that the page has her write."""
    for code in programs():
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            (tmp_path / name[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[str]:
    return re.findall(r"^ {4}(\S.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), re.M)


@pytest.mark.usefixtures("reader", "one_thread")
def test_programs_run_and_the_network_learns() -> None:
    names: dict[str, object] = {}
    for code in programs():
        exec(code, names)
    assert names["learner"].block_names == ["conv", "stage.0", "stage.1"]
    assert "# ['conv', 'stage.0', 'stage.1']" in TEXT
    assert names["accuracy"] > 0.8


@pytest.mark.usefixtures("reader", "one_thread")
def test_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    install, *own = commands()
    assert install == "pip install ."
    assert len(own) == TEXT.count("    locallearn ") > 0
    for command in own:
        program, *arguments = shlex.split(command)
        assert program == "locallearn"
        assert main(arguments) == 0, (command, capsys.readouterr().err)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
