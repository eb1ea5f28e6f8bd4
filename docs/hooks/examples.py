"""The page of the programs in examples/: what each says of itself, and its code."""

from __future__ import annotations

import ast
from pathlib import Path

_INTRODUCTION = """# Examples

Short programs, each a whole story, in the directory `examples/` of the repository. They need
nothing but `pip install locallearn`, unless they say so, and download nothing. What they print is
what was measured, on two CPU cores, also where backpropagation does better.
"""


def examples_page(directory: Path) -> str:
    """The page, in Markdown: one section for each program, headed by what it shows."""
    sections = [_INTRODUCTION]
    for path in sorted(directory.glob("*.py")):
        source = path.read_text()
        docstring = ast.get_docstring(ast.parse(source))
        if docstring is None:
            raise ValueError(f"{path} has no docstring to say what it shows.")
        code = source.split('"""', 2)[2].strip()
        indented = "\n".join(f"    {line}".rstrip() for line in code.splitlines())
        title, _, story = docstring.partition("\n\n")
        sections += [
            f"## {title.rstrip('.')} {{#{path.stem}}}\n",
            f"{story}\n",
            f'??? example "The program"\n\n    ```python\n{indented}\n    ```\n',
        ]
    return "\n".join(sections)
