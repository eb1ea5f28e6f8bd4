"""What docs/new-rule.md shows runs: its rules, its tests, its package."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits

from locallearn import LocalLearner, UserError, build_model, build_rule
from locallearn.analysis import step_cost
from locallearn.rules import parse_rule, unregister_rule

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "new-rule.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
EXAMPLES = [code for name, code in BLOCKS if name == "my_rules.py"][:3]
RULES = ("anchors", "contrast", "mono-forward")


def code_of(name: str) -> str:
    (code,) = (code for each, code in BLOCKS if each == name)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's package is once it is installed: its module, and metadata that declare it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_rules.py").write_text("\n\n".join(EXAMPLES))
    (folder / "test_my_rules.py").write_text(code_of("test_my_rules.py"))
    (snippet,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    project = tomllib.loads(snippet)["project"]
    declare(folder, project["name"], project["version"], project["entry-points"])
    return folder


def declare(folder: Path, name: str, version: str, groups: dict[str, dict[str, str]]) -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def my_rules(folder: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_rules")
    sys.path.remove(str(folder))
    for name in RULES:
        unregister_rule(name)
    for name in ("my_rules", "test_my_rules"):
        sys.modules.pop(name, None)


def test_examples_take_twenty_lines() -> None:
    assert len(EXAMPLES) == 3
    for code in EXAMPLES:
        assert len([line for line in code.splitlines() if line]) <= 20


@pytest.mark.usefixtures("my_rules")
@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", TEXT, re.M))
def test_the_page_s_tests_pass(name: str, one_thread: None) -> None:
    getattr(importlib.import_module("test_my_rules"), name)()


@pytest.mark.usefixtures("my_rules")
@pytest.mark.parametrize("rule", RULES)
def test_rules_learn_digits(rule: str, one_thread: None) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    model = build_model("smallconv", in_channels=1, num_classes=10, width=0.5)
    learner = LocalLearner(model, rule, num_classes=10)
    first = learner.step(images[:64], labels[:64])
    for start in range(0, 768, 64):
        last = learner.step(images[start : start + 64], labels[start : start + 64])
    for name, loss in last.block_losses.items():
        assert loss < first.block_losses[name], name
    right = learner(images[1000:1300]).argmax(dim=1) == labels[1000:1300]
    assert right.float().mean() > 0.7


@pytest.mark.usefixtures("my_rules")
def test_a_rule_of_the_whole_output_is_counted() -> None:
    """Forward, back to h, and the gradient of M: K multiplications each for a value of h."""
    model, rule = build_model("smallconv"), build_rule("mono-forward")
    cost = step_cost(model, rule, image_shape=(3, 32, 32), batch_size=8)
    num_values = 32 * 1024 + 64 * 256 + 128 * 64 + 512
    assert cost.learning_signal_macs == 2 * 10 * num_values
    assert cost.total_macs == 2 * cost.forward_macs + 3 * 10 * num_values


@pytest.mark.usefixtures("my_rules")
def test_a_script_uses_a_rule_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    exec(code_of("use.py"), {})
    assert "{'conv1': 'closed form'" in capsys.readouterr().out


def test_the_rule_with_a_setting_takes_the_place_of_the_one_without(my_rules: ModuleType) -> None:
    (with_setting,) = (code for name, code in BLOCKS if name == "my_rules.py" and "tau" in code)
    exec(with_setting, vars(my_rules))
    assert parse_rule("contrast:tau=0.2") == build_rule("contrast", tau=0.2)
    assert build_rule("contrast", tau=0.2).build_head(None).tau == 0.2
    with pytest.raises(UserError, match="tau must be above 0, got 0"):
        parse_rule("contrast:tau=0")


_SESSION = """
import sys, locallearn.rules
from locallearn.cli import main

assert not {"my_rules", "bad_rules"} & set(sys.modules), "importing locallearn loads plug-ins"
assert main(["list", "rules"]) == 0
small = "--epochs 1 --limit-train 96 --limit-test 64 --width 0.25 --num-threads 1"
assert main(["train", "--rule", "mono-forward", "--out", "run", *small.split()]) == 0
assert main(["train", "--rule", "broken"]) == 2
"""


def test_the_command_line_finds_an_installed_package_s_rules(folder: Path, tmp_path: Path) -> None:
    declare(tmp_path, "bad-rules", "3", {"locallearn.rules": {"broken": "bad_rules:Broken"}})
    (tmp_path / "bad_rules.py").write_text("import nowhere_to_be_found\n")
    path = os.pathsep.join([str(ROOT / "src"), str(folder), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", _SESSION],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in RULES:
        (row,) = (line for line in done.stdout.splitlines() if f" {name} " in line)
        assert "my-rules 0.1" in row
    (row,) = (line for line in done.stdout.splitlines() if " lls " in line)
    assert "locallearn" in row
    assert "test accuracy" in done.stdout
    config = (tmp_path / "run" / "config.json").read_text()
    assert '"rule": "mono-forward"' in config
    assert '"my-rules": "0.1"' in config
    warning, error = (line for line in done.stderr.splitlines() if "bad-rules" in line)
    said = (
        "rule 'broken' is declared by bad-rules 3 (entry point broken = bad_rules:Broken), which "
        "can't be loaded: ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    )
    assert warning == f"Warning: {said}"
    assert error == f"Error: unknown rule: {said}"


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
