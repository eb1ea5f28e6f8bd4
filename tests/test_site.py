"""The documentation builds as a site: no warning, no dead link, nothing fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer.main

import locallearn
from locallearn.cli.main import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every warning of mkdocs or a plug-in is an error."""
    path = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return path


class Page(HTMLParser):
    """What a page loads, and what it says in paragraphs, apart from code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.paragraphs: list[str] = []
        self._open: list[str] = []  # of p and code
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.loads.append(values.get("src") or "")
        if tag == "link":
            self.loads.append(values.get("href") or "")
        if tag == "p":
            self.paragraphs.append("")
        if tag in ("p", "code"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "code"):
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._open == ["p"]:
            self.paragraphs[-1] += data


def pages(site: Path) -> dict[str, Page]:
    return {path.name: Page(path) for path in sorted(site.glob("*.html"))}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for name, page in pages(site).items():
        assert page.loads
        for address in page.loads:
            assert not re.match(r"(https?:)?//", address), (name, address)
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text()), path


def test_markdown_reads_as_on_github(site: Path) -> None:
    """Lists, tables and fences need a blank line before them here, and none there."""
    for name, page in pages(site).items():
        for paragraph in page.paragraphs:
            unread = re.search(r"^\s*([-*] |\d+\. |\|.*\|$)", paragraph, re.M)
            assert not unread, (name, paragraph)


def test_sources_are_no_part_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_every_command_and_option_has_its_place(site: Path) -> None:
    text = (site / "commands.html").read_text()
    for command, options in commands("locallearn", typer.main.get_command(app)):
        if command == "locallearn":
            continue
        assert f">{command}<" in text
        for option in options:
            assert f'<code class="word">{option}' in text, (command, option)


def commands(name: str, command: Any) -> Iterator[tuple[str, list[str]]]:
    """(name, its options) of a command and all of its subcommands."""
    yield name, [p.opts[0] for p in command.params if p.param_type_name == "option"]
    for inner_name, inner in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {inner_name}", inner)


def test_every_public_name_has_its_place(site: Path) -> None:
    index = (site / "api.html").read_text()
    for name in set(locallearn.__all__) - {"__version__"}:
        assert f">{name}</code></a>" in index, name
    for room in ("data", "engine", "export", "integrations", "kernels", "models", "rules"):
        module = __import__(f"locallearn.{room}", fromlist=["__all__"])
        text = (site / f"api-{room}.html").read_text()
        for name in module.__all__:
            assert f'id="locallearn.{room}.{name}"' in text, name


def test_docstrings_read_as_text(site: Path) -> None:
    """No section of a docstring is left as it was typed, and no role."""
    for path in site.glob("api*.html"):
        text = path.read_text()
        assert not re.search(r":(meth|class|func):|<em>|<strong>\w", text), path
        assert not re.search(r"<p>(Arguments|Returns|Raises|Attributes):", text), path


def test_every_example_has_its_place(site: Path) -> None:
    text = (site / "examples.html").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f'id="{path.stem}"' in text
