"""Runs the Triton kernels' own code on CPU tensors, in Triton's interpreter.

What the kernels compile to on a device is looked at in test_triton_compiled.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import triton
import triton.language.standard
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction


class _Interpreted(InterpretedFunction):
    """A kernel, or what it calls, which finds the language as the kernel's start has made it.

    Made anew at every call, as InterpretedFunction has it, that took a fifth of the time.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.rewrite()(*args, **kwargs)


@contextmanager
def interpreted(kernels: ModuleType) -> Iterator[None]:
    """Kernels and Triton's own jit functions are interpreted meanwhile.

    TRITON_INTERPRET=1 would be for the whole process, torch.compile's use of Triton included. The
    interpreter puts its own functions into the language, and leaves some of them there. It also
    looks for an overflow in every integer product and sum, which GPUs do not, and which takes half
    of the time: none overflows at the sizes here.

    Arguments:
        kernels: the package whose modules hold the kernels.
    """
    core = triton.language.core
    language = [triton.language, core, triton.language.math, triton.language.standard]
    changed = [*language, core.tensor, core.dtype, core.condition, core.tensor_descriptor_base]
    before = [dict(vars(place)) for place in changed]

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + ".")]
    functions: dict[int, InterpretedFunction] = {}  # by id: to hash one would parse it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        patch.setattr(interpreter_builder, "options", options)
        for module in [*language, *(importlib.import_module(name) for name in names)]:
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    if id(function) not in functions:
                        kind = InterpretedFunction if module in language else _Interpreted
                        functions[id(function)] = kind(function.fn)
                    patch.setattr(module, name, functions[id(function)])
        yield
    for place, attributes in zip(changed, before, strict=True):
        for name, value in list(vars(place).items()):
            if name in attributes and value is not attributes[name]:
                setattr(place, name, attributes[name])
            elif name not in attributes and isinstance(place, type):
                delattr(place, name)
