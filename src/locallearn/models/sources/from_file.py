"""Networks from a Python file of the user's: a function that returns one."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from locallearn.errors import UserError, unknown_name
from locallearn.models.sources.blame import is_own, say_error
from locallearn.models.sources.names import ForeignName

RESERVED = {
    "num_classes": "it is the number of classes of the data",
    "in_channels": "it is the number of channels of the data",
    "image_size": "it is the size of the data's images",
}

# Modules that files have imported from beside themselves, by name.
_imported: set[str] = set()


def check(name: ForeignName) -> None:
    """Raises UserError where there is no such file. Nothing of it is run."""
    path = name.path
    assert path is not None
    if not path.is_file():
        raise UserError(
            f"there is no file {path}, which builds the model {name.name!r}. Give its path, or "
            f"put it back."
        )


def file_digest(path: Path) -> str | None:
    """sha256 of a file's content, hexadecimal; None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def build(
    name: ForeignName,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """Run the file, then call its function.

    The function is given those of ``num_classes``, ``in_channels`` and ``image_size`` (height and
    width, where it is known) that it takes, by name or as ``**kwargs``, and the options. Modules
    beside the file can be imported meanwhile.

    Raises:
        UserError: no such file or function, an option that the function does not take, a result
            that is no module, or whatever the file itself raises, with its line.
    """
    check(name)
    path = name.path
    assert path is not None
    facts: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    if image_size is not None:
        facts["image_size"] = image_size
    with _importable(path.parent):
        module = _run_file(name, path)
        function = _function(module, name)
        arguments = _arguments(function, name, facts)
        try:
            model = function(**arguments)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"model {name.text!r} can't be built: {say_error(error, name)}."
            ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{name.name} of {path} returns {type(model).__name__}; it must return the model, a "
            f"torch.nn.Module."
        )
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Within: modules in a folder can be imported.

    Those that were imported so before are forgotten: they may be of another folder, or edited.
    """
    for name in _imported:
        sys.modules.pop(name, None)
    _imported.clear()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin is not None and is_own(Path(origin), folder):
                _imported.add(name)


def _run_file(name: ForeignName, path: Path) -> ModuleType:
    """The file as a module. Not through an import, which may take stale bytecode for it."""
    key = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"locallearn_model_{path.stem}_{key}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and torch.compile look for it
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise UserError(f"model file {path} can't be run: {say_error(error, name)}.") from error
    return module


def _function(module: ModuleType, name: ForeignName) -> Callable[..., Any]:
    """What the name stands for in the file: a function, or a module's class."""
    found = getattr(module, name.name, None)
    if isinstance(found, nn.Module):
        raise UserError(
            f"{name.name} of {name.path} is a {type(found).__name__} that is built already. Name a "
            f"function that builds it anew, or the class."
        )
    if callable(found):
        return found  # type: ignore[no-any-return]
    public = [
        key
        for key, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", None) == module.__name__
        and not key.startswith("_")
    ]
    if not public:
        raise UserError(f"{name.path} has no function {name.name!r}, and no other either.")
    raise unknown_name(f"function of {name.path}:", name.name, public)


def _arguments(
    function: Callable[..., Any], name: ForeignName, facts: dict[str, Any]
) -> dict[str, Any]:
    """What to call the function with: facts that it takes, and options, all of which it must."""
    parameters = inspect.signature(function).parameters.values()
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return facts | name.options
    for option in name.options:
        if option not in taken:
            own = [each for each in taken if each not in RESERVED]
            raise UserError(
                f"{name.name} of {name.path} has no option {option!r}; it has: "
                f"{', '.join(own) or 'none'}."
            )
    return {key: value for key, value in facts.items() if key in taken} | name.options
