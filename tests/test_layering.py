"""One direction of knowledge: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "locallearn"
BASE = {"errors", "registry", "_version"}

MAY_IMPORT = {
    "kernels": set(),
    "rules": {"kernels"},
    "models": set(),
    "data": {"kernels"},
    "engine": {"kernels", "rules", "models", "data"},
    "analysis": {"kernels", "rules", "models", "data", "engine"},
    "export": {"kernels", "rules", "models", "data", "engine"},
    "recipes": {"kernels", "rules", "models", "data", "engine", "analysis"},
    "distributed": {"data", "engine"},
    "integrations": {"rules", "engine"},
    "cli": {
        "kernels",
        "rules",
        "models",
        "data",
        "engine",
        "analysis",
        "export",
        "recipes",
        "distributed",
    },
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("locallearn.")}
    return rooms


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_room_imports_only_what_it_may_know(room: str) -> None:
    files = list((SOURCE / room).rglob("*.py"))
    assert files
    for path in files:
        extra = imported_rooms(path) - MAY_IMPORT[room] - BASE - {room}
        assert not extra, f"{path.relative_to(SOURCE)} imports {extra}"


def test_every_room_is_known() -> None:
    rooms = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "room",
    [
        "kernels",
        "rules",
        "models",
        "engine",
        "integrations",
        "analysis",
        "export",
        "recipes",
        "distributed",
    ],
)
def test_only_data_and_the_top_print(room: str) -> None:
    for path in (SOURCE / room).rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed, f"{path} prints"


def test_import_and_help_need_no_torch() -> None:
    code = (
        "import sys, locallearn, locallearn.cli.main\n"
        "assert 'torch' not in sys.modules, 'import locallearn imports torch'\n"
        "assert set(locallearn.__all__) <= set(dir(locallearn))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve() -> None:
    import locallearn

    for name in locallearn.__all__:
        assert getattr(locallearn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = locallearn.nothing
