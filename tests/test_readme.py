"""What the README shows runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from locallearn.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    loader = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 9])) for _ in range(2)]
    names = {"loader": loader}
    exec(code, names)
    assert names["learner"](loader[0][0]).shape == (4, 10)


def commands() -> list[str]:
    text = README.replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in re.findall(r"^ +(locallearn .*)$", text, re.M)]


@pytest.mark.parametrize("command", commands())
def test_commands_know_their_flags(command: str, capsys) -> None:
    """Every flag shown is one that the command's help lists."""
    _, name, *rest = shlex.split(command)
    assert main([name, "--help"]) == 0
    listed = capsys.readouterr().out
    for word in rest:
        if word.startswith("--"):
            assert word in listed


def test_files_that_are_linked_exist() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (root / target).exists(), target
