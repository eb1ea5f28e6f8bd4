"""exits.json of a run directory: the exits' temperatures, and the threshold that was chosen.

They belong to the weights that they were fitted to, and are left aside where those have changed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locallearn.engine.files import write_json
from locallearn.errors import UserError

FORMAT = "locallearn-exits"


@dataclass(frozen=True)
class ExitRecord:
    """What exits.json holds.

    Attributes:
        weights: digest of the weights that this was found for.
        temperatures: exit name -> temperature.
        threshold: of the probability, at which images leave unless told otherwise.
        num_images: that the temperatures were fitted on.
    """

    weights: str
    temperatures: dict[str, float]
    threshold: float
    num_images: int

    def write(self, path: Path) -> None:
        """Raises OSError as the file system says."""
        write_json(path, {"format": FORMAT, **self.__dict__})

    @classmethod
    def read(cls, path: Path) -> ExitRecord | None:
        """None where there is no such file.

        Raises:
            UserError: a file that :meth:`write` has not made.
        """
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is no valid JSON ({error}). {_REMEDY}") from error
        try:
            if value["format"] != FORMAT:
                raise ValueError("of another format")
            record = cls(
                str(value["weights"]),
                {str(name): float(t) for name, t in value["temperatures"].items()},
                float(value["threshold"]),
                int(value["num_images"]),
            )
            numbers = [record.threshold, *record.temperatures.values()]
            if not all(math.isfinite(n) and n >= 0 for n in numbers):
                raise ValueError("a number out of range")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} can't be read ({error}). {_REMEDY}") from error
        return record


_REMEDY = "Remove it; `locallearn evaluate RUN --early-exit` makes it anew."
