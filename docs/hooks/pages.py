"""Pages of the site that no file in docs/ holds, and links that lead out of docs/.

On GitHub a page's link `../src/...` or `../examples/...` leads to the file. The site has no such
files: a link to an example leads to its place on the page of the examples, and any other file that
is linked comes along.
"""

from __future__ import annotations

import re
from pathlib import Path

from api import api_pages
from commands import command_reference
from examples import examples_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_OUTWARD = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    pages = {
        "changes.md": (root / "CHANGELOG.md").read_text(),
        "commands.md": command_reference(),
        "examples.md": examples_page(root / "examples"),
        **api_pages(),
    }
    for page in files.documentation_pages():
        for target in _OUTWARD.findall(page.content_string):
            if not target.startswith("examples/"):
                _add_file(files, config, page.src_uri, root, target)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _add_file(files: Files, config: MkDocsConfig, page: str, root: Path, target: str) -> None:
    path = root / target
    if not path.is_file() or path.suffix == ".md":
        raise PluginError(
            f"{page} links to ../{target}, which the site cannot show: it must be a file that "
            f"exists and is no page."
        )
    if files.get_file_from_path(f"files/{target}") is None:
        files.append(File.generated(config, f"files/{target}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # On GitHub what lies within <details> is Markdown without being told so.
    markdown = markdown.replace("<details>", '<details markdown="1">')
    return _OUTWARD.sub(lambda match: f"]({_place(match[1])})", markdown)


def _place(target: str) -> str:
    """Where the site has the file ``target`` of the repository."""
    if target.startswith("examples/"):
        return f"examples.md#{Path(target).stem}"
    return f"files/{target}"
