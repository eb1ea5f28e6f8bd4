"""From a learner to a file that is known to give its answers.

Shapes: N batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from locallearn.engine import LocalLearner
from locallearn.engine.exits import EarlyExits
from locallearn.engine.files import check_target, write_atomically
from locallearn.errors import UserError
from locallearn.export.description import Description, Exit, Origin
from locallearn.export.files import (
    DEFAULT_OPSET,
    ONNX_SUFFIX,
    PROGRAM_SUFFIX,
    ExportedModel,
    OnnxModel,
    ProgramModel,
    check_opset,
    load_onnx_package,
    onnx_content,
    program_content,
)
from locallearn.export.network import DeviceNetwork, check_exportable, output_name, trace
from locallearn.export.quantization import int8_content
from locallearn.export.verification import (
    Checked,
    Comparison,
    Reference,
    batches_of_sizes,
    compare,
)

TOLERANCE = 1e-4  # of logits, absolute
_BATCH_SIZE = 128  # images that are compared at a time


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: of it.
        num_bytes: its size.
        description: what it says of itself.
        comparison: with the network, on the images that were given.
    """

    path: Path
    num_bytes: int
    description: Description
    comparison: Comparison


def export_onnx(
    learner: LocalLearner,
    path: str | Path,
    images: Tensor,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    class_names: Sequence[str] = (),
    exits: bool = False,
    opset: int = DEFAULT_OPSET,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a learner's network as an ONNX file that gives the same logits on these images.

    The network is exported as it evaluates: at a schedule-free optimizer's average, with
    BatchNorm's statistics for it, in float32. The learner is left in evaluation mode. The batch
    may have any size. Needs the extra `onnx`.

    Arguments:
        learner: its weights are float32.
        path: of the file, which ends in .onnx.
        images: some, real ones at best: float32 (N, ...) as the learner takes them; or, with
            ``mean`` and ``std``, uint8 pixels (N, H, W, C), which the file then takes too.
        mean, std: of each channel, of pixel values in [0, 1]: what turns pixels into the
            learner's input, (pixel / 255 - mean) / std. The file does that by itself.
        class_names: in label order, for the file's metadata.
        exits: whether each block at which images can leave has an output too, of its local
            logits, named as the block; with the temperatures that the learner has for them.
        opset: version of ONNX's operators.
        tolerance: the largest difference of a logit between the file and the network.

    Raises:
        UserError: a package that is missing, a network that can't be exported, images that are not
            as said above, or an answer that differs; nothing is written then.
        OSError: as the file system says.
    """
    return _export(
        learner, path, images, mean, std, class_names, exits, tolerance, ONNX_SUFFIX, opset
    )


def export_program(
    learner: LocalLearner,
    path: str | Path,
    images: Tensor,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    class_names: Sequence[str] = (),
    exits: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a learner's network as an archive of torch.export, which torch runs without this
    package; as :func:`export_onnx` in all else.

    Arguments:
        learner, images, mean, std, class_names, exits, tolerance: see :func:`export_onnx`.
        path: of the file, which ends in .pt2.

    Raises:
        UserError, OSError: see :func:`export_onnx`.
    """
    return _export(
        learner, path, images, mean, std, class_names, exits, tolerance, PROGRAM_SUFFIX, None
    )


def quantize_onnx(source: str | Path, path: str | Path, images: Tensor) -> Description:
    """Write the int8 file of a float32 ONNX file, by onnxruntime's static quantiser.

    Arguments:
        source: a file of :func:`export_onnx`.
        path: of the int8 file.
        images: to calibrate on, of the training part, as the source takes them.

    Returns:
        What the int8 file says of itself.

    Raises:
        UserError: a package that is missing, no such file, or one that can't be quantised.
        OSError: as the file system says.
    """
    check_file(Path(path), ONNX_SUFFIX, "path")
    content = Path(source).read_bytes()
    description = OnnxModel(content, str(source)).description
    images = images.detach().cpu()
    _check_images(images, description.takes_pixels)
    batches = torch.split(images, _BATCH_SIZE)
    int8, model = int8_content(content, description, batches, len(images))
    write_atomically(Path(path), int8)
    return model.description


def _export(
    learner: LocalLearner,
    path: str | Path,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str],
    exits: bool,
    tolerance: float,
    suffix: str,
    opset: int | None,
) -> Exported:
    target, images = Path(path), images.detach().cpu()
    check_file(target, suffix, "path")
    check_tolerance(tolerance)
    takes_pixels = bool(mean) or bool(std)
    _check_images(images, takes_pixels)
    if takes_pixels and not len(mean) == len(std) == images.shape[3]:
        raise UserError(
            f"mean and std must have a number for each of the {images.shape[3]} channels, got "
            f"{len(mean)} and {len(std)}."
        )
    if class_names and len(class_names) != learner.num_classes:
        raise UserError(
            f"class_names has {len(class_names)} names for {learner.num_classes} classes."
        )
    inputs = normalized(images, mean, std) if takes_pixels else images
    device = next(learner.model.parameters()).device
    learner(inputs[:3].to(device))  # at the weights and statistics that it evaluates at
    found = learner.early_exits(inputs[:3].to(device)) if exits else None
    origin = Origin(type(learner.model).__name__, learner.rule.name, class_names=tuple(class_names))
    description = Description(
        origin,
        takes_pixels,
        tuple(images.shape[1:]),
        learner.num_classes,
        tuple(map(float, mean)),
        tuple(map(float, std)),
        *described_exits(learner, found),
    )
    content, model = make_file(learner, found, description, images[:3], opset)
    reference = Reference(learner, found)
    parts = (slice(at, at + _BATCH_SIZE) for at in range(0, len(images), _BATCH_SIZE))
    comparison = compare(
        model, reference, (Checked(images[part], inputs[part], None) for part in parts)
    )
    comparison.check(tolerance)
    compare(model, reference, batches_of_sizes(Checked(images, inputs, None))).check(tolerance)
    write_atomically(target, content)
    return Exported(target, len(content), description, comparison)


def make_file(
    learner: LocalLearner,
    exits: EarlyExits | None,
    description: Description,
    example: Tensor,
    opset: int | None,
) -> tuple[bytes, ExportedModel]:
    """A file's content, and what it does, loaded from there.

    Arguments:
        learner: in evaluation mode, its statistics those of its weights.
        exits: whose logits are outputs too; None for none.
        description: of the file.
        example: a few images as the file takes them.
        opset: of an ONNX file; None for one of torch.export.

    Raises:
        UserError: see :func:`export_onnx`.
    """
    check_exportable(learner.model)
    if opset is not None:
        check_opset(opset)
        load_onnx_package("onnx")  # before the network is traced, which takes longer
    device = next(learner.model.parameters()).device
    program = trace(DeviceNetwork(learner, exits, description), example.to(device))
    if opset is not None:
        content = onnx_content(program, description, opset)
        return content, OnnxModel(content)
    content = program_content(program, description)
    return content, ProgramModel(content)


def described_exits(
    learner: LocalLearner, exits: EarlyExits | None
) -> tuple[tuple[Exit, ...], float]:
    """What a file says of its exits, and the temperature of its logits.

    Arguments:
        learner: knows the temperatures; 1 of what is not calibrated.
        exits: of it; None for none.
    """
    if exits is None:
        return (), 1.0
    temperatures = dict.fromkeys(exits.names, 1.0) | learner.exit_temperatures
    *blocks, output = exits.names
    found = tuple(Exit(output_name(each), each, temperatures[each]) for each in blocks)
    return found, temperatures[output]


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pixels (N, H, W, C) as a network's input, float32 (N, C, H, W)."""
    values = pixels.float() / 255
    scaled = (values - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(0, 3, 1, 2)


def check_file(path: Path, suffix: str, name: str) -> None:
    """Raises UserError where a file of this kind can't be put there."""
    check_target(path, name)
    if path.suffix != suffix:
        raise UserError(f"{name} {path} must end in {suffix}.")


def check_tolerance(tolerance: float) -> None:
    """Raises UserError for what is no tolerance."""
    if not 0 <= tolerance < math.inf:
        raise UserError(f"the tolerance must be at least 0, got {tolerance}.")


def _check_images(images: Tensor, takes_pixels: bool) -> None:
    if len(images) == 0:
        raise UserError("the file is compared with the network on images: give at least one.")
    if takes_pixels and (images.dtype != torch.uint8 or images.ndim != 4):
        raise UserError(
            f"with mean and std, images must be uint8 pixels of shape (N, H, W, C), got "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    if not takes_pixels and images.dtype != torch.float32:
        raise UserError(
            f"images must be float32, as the learner takes them, got {images.dtype}; for pixels "
            f"give mean and std too."
        )
