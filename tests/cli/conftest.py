"""What the tests of several subcommands share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from locallearn.cli import main


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command that must end with exit code 2 and one line on standard error: that line."""

    def run(arguments: list[str]) -> str:
        code = main(arguments)
        captured = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in captured.err + captured.out
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("Error: ")
        return line

    return run
