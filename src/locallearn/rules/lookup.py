"""Rules by name: those of this package, those of the caller's own, and those of plug-ins."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

from locallearn.errors import UserError, unknown_name
from locallearn.rules import plugins
from locallearn.rules.base import RULES, Rule


def list_rules(pattern: str = "*") -> list[str]:
    """Names of the registered rules that match the glob ``pattern``, sorted.

    Of a plug-in that can't be loaded a warning tells, once.
    """
    for name in plugins.declared():
        if problem := plugins.load(name):
            _warn_once(problem)
    return RULES.names(pattern)


def rule_class(name: str) -> type[Rule]:
    """The class behind a name.

    Raises:
        UserError: an unknown name (lists the valid ones and the nearest), or one whose plug-in
            can't be loaded (says why).
    """
    if problem := plugins.load(name):
        raise UserError(f"unknown rule: {problem}")
    if name not in RULES:
        raise unknown_name("rule", name, list_rules())
    return RULES.get(name)


def rule_package(name: str) -> str | None:
    """The distribution whose plug-in a rule is; None for this package's rules and the caller's."""
    return plugins.package(name)


def build_rule(name: str, **options: Any) -> Rule:
    """A rule by name.

    Arguments:
        name: one of :func:`list_rules`.
        options: the rule's own settings, e.g. ``basis="square", setting="official"``; what is
            left out takes the rule's default.

    Raises:
        UserError: unknown name (lists the valid ones), an option the rule does not have (lists
            those it has), or a value out of range.
    """
    cls = rule_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise UserError(f"rule {name!r} has no option {option!r}; it has: {', '.join(known)}.")
    factory: Callable[..., Rule] = cls
    return factory(**options)


def parse_rule(text: str) -> Rule:
    """A rule as a name, or a name with options: ``NAME:OPTION=VALUE:OPTION=VALUE``.

    For example ``local-losses:local_loss=predsim`` or ``bp:bp_memory=accumulate:4``.

    Raises:
        UserError: as :func:`build_rule`, or a value of another type than the option's.
    """
    name, options = split_rule(text)
    return build_rule(name, **options)


def split_rule(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a rule as text, each value in its option's type.

    Raises:
        UserError: as :func:`parse_rule`.
    """
    name, *parts = re.split(r":(?=[\w-]+=)", text.strip())
    cls = rule_class(name)
    options: dict[str, Any] = {}
    for part in parts:
        option, _, value = part.partition("=")
        option = option.replace("-", "_")
        if option in options:
            raise UserError(f"option {option!r} of rule {name!r} is given twice.")
        options[option] = _value(cls, option, value)
    return name, options


_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def _value(cls: type[Rule], option: str, text: str) -> Any:
    """The text in the option's type; as it is where the option has another one, or is unknown."""
    kinds = _kinds(cls, option)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for kind in (bool, int, float):
        if kind in kinds:
            try:
                return _BOOLEANS[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                raise UserError(
                    f"option {option!r} of rule {cls.name!r} is {kind.__name__}, got {text!r}."
                ) from None
    return text


def _kinds(cls: type[Rule], option: str) -> set[Any]:
    """float -> {float}; int | None -> {int, None's type}."""
    hint = typing.get_type_hints(cls).get(option)
    return set(typing.get_args(hint)) or {hint}


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)
