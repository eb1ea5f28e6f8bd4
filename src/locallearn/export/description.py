"""What an exported file says of itself, so that it alone suffices to be used."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from locallearn._version import __version__
from locallearn.errors import UserError

FORMAT = "locallearn-export"
FORMAT_VERSION = 1

INPUT = "images"
LOGITS = "logits"


@dataclass(frozen=True)
class Origin:
    """Where an exported network comes from; all of it for people, and none of it needed to run it.

    Arguments:
        model: its name.
        rule: that trained it.
        dataset: that it was trained on.
        run: name of the run directory.
        num_epochs: that it was trained for.
        resize: what an image's shorter side is scaled to before the crop, pixels; None if it is
            not.
        class_names: in label order; empty where they are not known.
    """

    model: str
    rule: str
    dataset: str | None = None
    run: str | None = None
    num_epochs: int | None = None
    resize: int | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exit:
    """An output besides the logits.

    Arguments:
        name: of the output in the file.
        block: whose local logits it is.
        temperature: that they are to be divided by before a softmax tells probabilities.
    """

    name: str
    block: str
    temperature: float = 1.0


@dataclass(frozen=True)
class Description:
    """What an exported file takes and yields.

    Arguments:
        origin: where it comes from.
        takes_pixels: whether its input is uint8 pixels (N, H, W, C), which it normalises by
            itself; else it is float32 as the network was trained on, images (N, C, H, W).
        shape: of an input without the batch.
        num_classes: K.
        mean, std: of each channel, of pixel values in [0, 1]: what the network's input was
            normalised by; empty where that is not known.
        exits: outputs besides the logits, in the order of the forward.
        temperature: of the logits, as of an exit's.
        exit_threshold: probability at which an image may leave at an exit, as it was chosen for
            the run; None where it was not.
        quantization: how the weights and activations were made int8; None of a float32 file.
    """

    origin: Origin
    takes_pixels: bool
    shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    exits: tuple[Exit, ...] = ()
    temperature: float = 1.0
    exit_threshold: float | None = None
    quantization: str | None = None

    @property
    def output_names(self) -> list[str]:
        """Of the file's outputs, in their order: the logits, and each exit's."""
        return [LOGITS, *(each.name for each in self.exits)]

    @property
    def input_dtype(self) -> torch.dtype:
        """uint8 of pixels, else float32."""
        return torch.uint8 if self.takes_pixels else torch.float32

    def quantized(self, how: str) -> Description:
        """The same of the int8 file."""
        return replace(self, quantization=how)

    def to_text(self) -> str:
        """As the JSON that the file holds."""
        layout = None
        if len(self.shape) == 3:
            layout = "NHWC" if self.takes_pixels else "NCHW"
        values = "pixels, 0 to 255" if self.takes_pixels else "as the network was trained on"
        if self.mean and not self.takes_pixels:
            values = "(pixel / 255 - mean) / std"
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "locallearn": __version__,
            "torch": torch.__version__,
            "model": self.origin.model,
            "rule": self.origin.rule,
            "dataset": self.origin.dataset,
            "run": self.origin.run,
            "num_epochs": self.origin.num_epochs,
            "precision": "float32" if self.quantization is None else "int8",
            "quantization": self.quantization,
            "num_classes": self.num_classes,
            "class_names": list(self.origin.class_names),
            "input": {
                "name": INPUT,
                "dtype": "uint8" if self.takes_pixels else "float32",
                "shape": ["batch", *self.shape],
                "layout": layout,
                "values": values,
                "mean": list(self.mean),
                "std": list(self.std),
                "resize": self.origin.resize,
            },
            "exit_threshold": self.exit_threshold,
            "outputs": [
                {"name": LOGITS, "block": None, "temperature": self.temperature},
                *(
                    {"name": each.name, "block": each.block, "temperature": each.temperature}
                    for each in self.exits
                ),
            ],
        }
        return json.dumps(value)

    @classmethod
    def from_text(cls, text: str, origin: str) -> Description:
        """The counterpart of :meth:`to_text`.

        Arguments:
            text: as the file holds it.
            origin: the file, for messages.

        Raises:
            UserError: not what :meth:`to_text` makes, or of another version.
        """
        try:
            value: Any = json.loads(text)
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r}")
            if value["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{origin} has format version {value['format_version']}; this locallearn "
                    f"reads version {FORMAT_VERSION}. Use the version that made it."
                )
            given = value["input"]
            return cls(
                origin=Origin(
                    model=value["model"],
                    rule=value["rule"],
                    dataset=value["dataset"],
                    run=value["run"],
                    num_epochs=value["num_epochs"],
                    resize=given["resize"],
                    class_names=tuple(value["class_names"]),
                ),
                takes_pixels=given["dtype"] == "uint8",
                shape=tuple(given["shape"][1:]),
                num_classes=value["num_classes"],
                mean=tuple(given["mean"]),
                std=tuple(given["std"]),
                exits=tuple(
                    Exit(each["name"], each["block"], each["temperature"])
                    for each in value["outputs"][1:]
                ),
                temperature=value["outputs"][0]["temperature"],
                exit_threshold=value["exit_threshold"],
                quantization=value["quantization"],
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{origin} can't be read: it was not written by locallearn.") from error
