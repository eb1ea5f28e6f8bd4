"""Names of models from elsewhere.

torchvision:resnet18:stem=cifar
timm:vit_tiny_patch16_224:patch_size=4
nets/my_file.py:build_model:depth=3
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locallearn.errors import UserError, unknown_name

PACKAGES = ("torchvision", "timm")
FORMS = "torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
_OPTION = r":(?=[\w-]+=)"  # begins one
_MISSPELT = {"true": "True", "false": "False", "none": "None"}


@dataclass(frozen=True)
class ForeignName:
    """A name, taken apart.

    Arguments:
        text: the whole.
        source: "torchvision", "timm", or the path of a Python file.
        name: of the model there; of a file, of the function that builds it.
        options: keyword arguments of the builder.
    """

    text: str
    source: str
    name: str
    options: dict[str, Any]

    @property
    def path(self) -> Path | None:
        """Of the file, absolute; None of a package's model."""
        return None if self.source in PACKAGES else Path(self.source).expanduser().absolute()


def is_foreign(name: str) -> bool:
    """Whether a model's name is one of a model from elsewhere, and none of the registry."""
    return ":" in name or name.endswith(".py")


def parse_name(text: str) -> ForeignName:
    """``SOURCE:NAME`` or ``SOURCE:NAME:OPTION=VALUE:OPTION=VALUE``.

    Values are Python literals where they can be read as such (``depth=3``, ``layers=[2,2]``), else
    text (``stem=cifar``).

    Raises:
        UserError: no such form, or an option that can't be meant.
    """
    head, *parts = re.split(_OPTION, text.strip())
    file = re.fullmatch(r"(.+\.py)(?::(.*))?", head)
    source, colon, name = head.partition(":")
    if source not in PACKAGES and file is not None:
        source, name = file[1], file[2] or ""
        if not name.isidentifier():
            raise UserError(
                f"model {text!r} names no function of {source}. Write FILE.py:FUNCTION, where "
                f"FUNCTION returns the model."
            )
    elif not colon:
        raise UserError(
            f"model {source!r} takes no options behind its name: those are of models from "
            f"elsewhere ({FORMS}). `locallearn train --help` lists what the package's own take."
        )
    elif source not in PACKAGES:
        raise unknown_name(f"source of model {text!r}:", source, (*PACKAGES, "FILE.py"))
    elif not name:
        raise UserError(
            f"model {text!r} names no model of {source}. "
            f"`locallearn list models '{source}:*'` lists them."
        )
    return ForeignName(text.strip(), source, name, _options(text, parts))


def _options(text: str, parts: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in parts:
        option, _, value = part.partition("=")
        option = option.replace("-", "_")
        if option in options:
            raise UserError(f"model {text!r} gives the option {option!r} twice.")
        if value in _MISSPELT:  # as text, "false" would count as true
            raise UserError(
                f"model {text!r}: values are written as in Python: {option}={_MISSPELT[value]}."
            )
        options[option] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def absolute_name(text: str) -> str:
    """The same name with the path of its file, where it has one, made absolute.

    Raises:
        UserError: as :func:`parse_name`.
    """
    foreign = parse_name(text)
    if foreign.path is None:
        return foreign.text
    return f"{foreign.path}{foreign.text.removeprefix(foreign.source)}"


def short_name(text: str) -> str:
    """A model's name for people: of a file, without the directories."""
    if not is_foreign(text):
        return text
    foreign = parse_name(text)
    if foreign.path is None:
        return foreign.text
    return f"{foreign.path.name}{foreign.text.removeprefix(foreign.source)}"
