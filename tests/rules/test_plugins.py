"""Rules that an installed package declares: when they are loaded, and what can be wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from locallearn import UserError, build_rule, list_rules
from locallearn.rules import lookup, plugins, rule_class, rule_package, unregister_rule

RULE = """
from locallearn.rules import LLS

class {cls}(LLS):
    name = "{name}"
"""

Install = Callable[..., None]


def forget() -> None:
    plugins.declared.cache_clear()
    plugins.load.cache_clear()
    lookup._warn_once.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package on the path: its module's code, and what it declares under which name."""
    modules: list[str] = []

    def put(name: str, code: str, **entries: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (metadata / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines]))
        modules.append(name)
        forget()

    before = list_rules()
    monkeypatch.syspath_prepend(tmp_path)
    yield put
    monkeypatch.undo()
    forget()
    for name in set(list_rules()) - set(before):
        unregister_rule(name)
    for module in modules:
        sys.modules.pop(module, None)


def test_a_plug_in_is_imported_when_its_rule_is_asked_for(install: Install) -> None:
    install("tides", RULE.format(cls="Tides", name="tides"), tides="tides:Tides")
    assert rule_class("lls").name == "lls"
    assert "tides" not in sys.modules
    assert build_rule("tides", basis="cosine").basis == "cosine"  # registered, undecorated
    assert rule_package("tides") == "tides"
    assert rule_package("lls") is None
    assert "tides" in list_rules("tid*")


def test_a_plug_in_may_register_its_rule_itself(install: Install) -> None:
    code = RULE.format(cls="Tides", name="tides")
    code += "from locallearn.rules import register_rule\nregister_rule(Tides)\n"
    install("tides", code, tides="tides:Tides")
    assert rule_class("tides").__module__ == "tides"


def test_one_that_cannot_be_imported_is_a_warning_and_no_rule(install: Install) -> None:
    install("broken", "raise RuntimeError('no licence')", ebb="broken:Ebb")
    install("tides", RULE.format(cls="Tides", name="tides"), tides="tides:Tides")
    said = (
        r"rule 'ebb' is declared by broken 1.0 \(entry point ebb = broken:Ebb\), which can't be "
        r"loaded: RuntimeError: no licence"
    )
    with pytest.warns(UserWarning, match=said):
        names = list_rules()
    assert {"tides", "lls"} < set(names)
    assert "ebb" not in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_rules() == names  # warned once
    with pytest.raises(UserError, match=f"unknown rule: {said}"):
        rule_class("ebb")


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        (
            {"lls": "mine:Waves"},
            RULE.format(cls="Waves", name="lls"),
            r"rule 'lls' is declared by mine 1.0 .*can't be loaded: rule 'lls' is registered "
            r"already, as locallearn.rules.lls.LLS; give mine.Waves another name",
        ),
        (
            {"waves": "mine:Waves"},
            RULE.format(cls="Waves", name="tides"),
            r"calls itself 'tides'; give the entry point that name",
        ),
        ({"waves": "mine"}, "", r"mine is no class of a rule; write it as 'module:Class'"),
        ({"waves": "mine:Waves"}, "Waves = 3", r"mine:Waves is no class of a rule"),
        ({"waves": "mine:Waves"}, "", r"AttributeError: module 'mine' has no attribute 'Waves'"),
        ({"waves": "mine:Waves"}, "class (", r"can't be loaded: SyntaxError"),
    ],
)
def test_errors_name_the_package(
    install: Install, entry: dict[str, str], code: str, message: str
) -> None:
    install("mine", code, **entry)
    (name,) = entry
    with pytest.raises(UserError, match=message):
        build_rule(name)
    with pytest.warns(UserWarning, match=message):
        assert "lls" in list_rules()


def test_two_packages_with_one_name_are_at_odds(install: Install) -> None:
    install("tides", RULE.format(cls="Tides", name="tides"), tides="tides:Tides")
    install("moon", RULE.format(cls="Tides", name="tides"), tides="moon:Tides")
    message = r"'tides' is declared by (moon|tides) 1.0 .* and by (moon|tides) 1.0 .*; keep one"
    with pytest.raises(UserError, match=message):
        build_rule("tides")
    assert build_rule("lls").name == "lls"
