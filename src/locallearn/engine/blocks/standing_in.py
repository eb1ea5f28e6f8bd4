"""Modules whose forward is another for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

# Under which name a BatchNorm has what is to be called before its forward.
_OBSERVER = "_locallearn_observer"
# And what is to be called instead of it.
_SUBSTITUTE = "_locallearn_substitute"


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within: calling one of these modules calls what is given for it instead of its forward."""
    # Through __dict__: an instance attribute hides the class's forward, and nn.Module's own
    # __setattr__ would cost more than it does for us. What another library put there comes back.
    before: list[Any] = [module.__dict__.get("forward") for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in zip(forwards, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextlib.contextmanager
def observing(observers: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    """Within: what is given for a BatchNorm is called before a forward of :func:`bound_forward`,
    with the same input."""
    try:
        for module, observer in observers.items():
            module.__dict__[_OBSERVER] = observer
        yield
    finally:
        for module in observers:
            module.__dict__.pop(_OBSERVER, None)


@contextlib.contextmanager
def normalizing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within: what is given for a BatchNorm is called instead of its forward, and instead of a
    forward of :func:`bound_forward` too."""
    try:
        for module, forward in forwards.items():
            module.__dict__[_SUBSTITUTE] = forward
        with standing_in(forwards):
            yield
    finally:
        for module in forwards:
            module.__dict__.pop(_SUBSTITUTE, None)


def observer_of(module: nn.Module) -> Callable[..., None] | None:
    """What is to see a BatchNorm's input, within :func:`observing`."""
    return module.__dict__.get(_OBSERVER)


def bound_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as it is now, to be called while others stand in for it."""
    forward: Callable[..., Any] = module.forward
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return forward
    return functools.partial(_run_observed, module, forward)  # which can be copied, as no closure


def _run_observed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    observer = observer_of(module)
    if observer is not None:
        observer(*args, **kwargs)
    forward = module.__dict__.get(_SUBSTITUTE, forward)
    return forward(*args, **kwargs)
