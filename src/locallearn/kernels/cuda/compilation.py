"""From the sources to machine code: by NVRTC, once for each set of constants and architecture.

What was compiled is kept on disk, in the cache folder of cuda.core, by what it was compiled from:
the source, all that it includes, its constants, the architecture and the compiler's version.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from locallearn.errors import UserError

if TYPE_CHECKING:
    from cuda.core import ObjectCode, ProgramOptions

# What NVRTC says where a machine's libraries are at fault, and not what it compiles.
_FAULTS = {
    "--gpu-architecture": "the NVRTC that is installed is too old or too new to compile the CUDA "
    "kernels for this device, {}",
    "libnvrtc-builtins": "NVRTC, which compiles the CUDA kernels, does not find its library "
    "libnvrtc-builtins",
}
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


class Program(NamedTuple):
    """A source and the constants that it is compiled for: the macros' names and values."""

    source: str
    constants: tuple[tuple[str, str], ...]


@functools.cache
def program(source: str, **constants: object) -> Program:
    """Arguments: a file beside this one, and what it says that a launch defines."""
    return Program(source, tuple((name, str(value)) for name, value in constants.items()))


@functools.cache
def source_text(name: str, *, without: str = "") -> str:
    """A file beside this one, with each file that it includes in the place of the first mention.

    One text, so that the cache on disk knows all that was compiled.

    Arguments:
        name: the file's.
        without: a file that is left out.
    """
    included = {without}

    def expanded(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        text = resources.files(__package__).joinpath(name).read_text()
        return _INCLUDE.sub(lambda found: expanded(found[1]), text.replace("#pragma once\n", ""))

    return expanded(name)


def options_for(
    program: Program, architecture: str, *, ptxas_options: Sequence[str] = ()
) -> ProgramOptions:
    """Arguments: what, and for what, as "sm_90"."""
    from cuda.core import ProgramOptions

    return ProgramOptions(
        name=program.source,
        arch=architecture,
        std="c++17",
        define_macro=list(program.constants),
        ptxas_options=list(ptxas_options) or None,
    )


def compiled(program: Program, architecture: str) -> ObjectCode:
    """The machine code, from the cache on disk where it is there.

    Raises:
        UserError: NVRTC can't be loaded or does not know the architecture, or the cache can't be
            written.
    """
    import cuda.core
    from cuda.core.utils import FileStreamProgramCache
    from cuda.pathfinder import DynamicLibNotFoundError

    options = options_for(program, architecture)
    try:
        with FileStreamProgramCache() as cache:
            return cuda.core.Program(source_text(program.source), "c++", options).compile(
                "cubin", cache=cache
            )
    except OSError as error:
        raise UserError(
            f"the cache of compiled kernels can't be used: {error}. Set XDG_CACHE_HOME to a folder "
            f"that can be written, or use --backend triton."
        ) from error
    except DynamicLibNotFoundError as error:
        raise UserError(
            f"the CUDA kernels are compiled by NVRTC, which can't be loaded "
            f"({_first_line(error)}). It comes with PyTorch for CUDA; or use --backend triton."
        ) from error
    except Exception as error:  # whose class has no public name
        # What it says of our own sources stays the bug that it is.
        fault = next((says for said, says in _FAULTS.items() if said in str(error)), None)
        if fault is None:
            raise
        raise UserError(f"{fault.format(architecture)}. Use --backend triton.") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
