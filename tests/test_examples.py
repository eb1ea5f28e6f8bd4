"""The programs in examples/ run, each in little of its length."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from locallearn import list_rules
from locallearn.rules import unregister_rule

EXAMPLES = Path(__file__).parents[1] / "examples"

# How much less than by default, and what of it is still reached.
SHORT = {
    "camera_stream": ({"num_frames": 60}, 0.0),
    "lightning_trainer": ({"epochs": 2}, 50.0),
    "own_loop": ({"epochs": 3}, 50.0),
    "own_rule": ({"epochs": 2}, 30.0),
    "resnet_cifar": ({"epochs": 1, "num_images": 64}, 0.0),
    "signals_1d": ({"steps": 10}, 30.0),
    "tabular_mlp": ({"epochs": 8, "num_splits": 1}, 80.0),
    "unusual_wiring": ({"epochs": 1}, 30.0),
    "vit_digits": ({"epochs": 1}, 0.0),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


# What Lightning says of loaders without workers, and what torch says of Lightning.
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", sorted(SHORT))
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, least = SHORT[name]
    rules = set(list_rules())
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)
    finally:
        for rule in set(list_rules()) - rules:
            unregister_rule(rule)
    reached = re.findall(r"accuracy ([\d.]+) %", capsys.readouterr().out)
    assert reached
    assert all(float(accuracy) >= least for accuracy in reached)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_example_says_what_it_shows(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert docstring is not None
    assert re.search(r"seconds|minute", docstring)
    assert f"    python examples/{name}.py" in docstring
