"""What went wrong in code of others, and where in the user's own."""

from __future__ import annotations

import traceback
from pathlib import Path

from locallearn.models.sources.names import ForeignName


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file is the user's own, and of no package that is installed below the folder."""
    return folder in path.parents and "site-packages" not in path.parts


def say_error(error: BaseException, name: ForeignName) -> str:
    """An error on one line; of a user's file with the line in it, or beside it, that raised it.

    Arguments:
        error: as caught.
        name: of the model.
    """
    kind, text = type(error).__name__, " ".join(str(error).split()).rstrip(".")
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {kind}: {error.msg}"
    what = f"{kind}: {text}" if text else kind
    if name.path is None:
        return what
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(Path(frame.filename), name.path.parent)]
    return f"{own[-1].filename}, line {own[-1].lineno}: {what}" if own else what
