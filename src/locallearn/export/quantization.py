"""An ONNX file in int8, by onnxruntime's static quantiser."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from locallearn.errors import UserError
from locallearn.export.description import INPUT, Description
from locallearn.export.files import OnnxModel, load_onnx_package, serialized
from locallearn.export.network import first_line, quietly

# How it is made, as the file says it.
HOW = (
    "static, QDQ: int8 weights within 7 bits and by channel, uint8 activations; ranges from the "
    "least to the greatest value of {num} images"
)

# Layers, and what stands between them; what the exits' heads do with norms stays in float32.
_QUANTIZED = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Concat",
    "Relu",
    "LeakyRelu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
)


def int8_content(
    content: bytes, description: Description, calibration: Iterable[Tensor], num_images: int
) -> tuple[bytes, OnnxModel]:
    """The content of the int8 file of a float32 one, and what it does, loaded from there.

    Weights get a scale for each output channel, activations one for each tensor, from the ranges
    seen on the calibration images. Quantize and dequantize nodes stand around each operator, which
    a runtime fuses where it has an int8 kernel.

    Arguments:
        content: of the float32 ONNX file.
        description: of it.
        calibration: batches of images as the file takes them, of the training part.
        num_images: how many these are together, for the description.

    Raises:
        UserError: a package that is missing, or a network that onnxruntime can't quantise.
    """
    onnx = load_onnx_package("onnx")
    tools = load_onnx_package("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="locallearn-") as directory:
        # Files, since the tools lose the weights of a model that is handed to them in memory.
        names = ("float32.onnx", "prepared.onnx", "int8.onnx")
        source, prepared, target = (Path(directory, name) for name in names)
        source.write_bytes(content)
        try:
            with quietly():
                # Without its own inference of shapes: the exporter has left them in the file.
                tools.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
                tools.quantize_static(
                    str(prepared),
                    str(target),
                    _reader(tools, calibration),
                    quant_format=tools.QuantFormat.QDQ,
                    op_types_to_quantize=list(_QUANTIZED),
                    nodes_to_exclude=_clipped_norms(onnx.load(str(prepared))),
                    per_channel=True,
                    # Products of 8 by 8 bits overflow the 16 bits that processors without VNNI
                    # add two of them in: SmallConv lost 4 points of accuracy to that on CIFAR-10.
                    reduce_range=True,
                    activation_type=tools.QuantType.QUInt8,
                    weight_type=tools.QuantType.QInt8,
                    calibrate_method=tools.CalibrationMethod.MinMax,
                )
                proto = onnx.load(str(target))
        except UserError:
            raise
        except Exception as error:  # of onnx', onnxruntime's and protobuf's many kinds
            raise UserError(
                f"onnxruntime can't quantise the network: {first_line(error)}. Leave out --int8."
            ) from error
    made = description.quantized(HOW.format(num=num_images))
    int8 = serialized(proto, made)
    return int8, OnnxModel(int8)


def _clipped_norms(proto: Any) -> list[str]:
    """Names of the nodes that keep a norm from zero: in eight bits a small one would be zero."""
    norms = {
        name for node in proto.graph.node if node.op_type == "ReduceL2" for name in node.output
    }
    return [
        node.name
        for node in proto.graph.node
        if node.op_type in ("Clip", "Max") and norms & set(node.input)
    ]


def _reader(tools: Any, calibration: Iterable[Tensor]) -> Any:
    batches: Iterator[Tensor] = iter(calibration)

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch.contiguous().numpy()}

    return Reader()
