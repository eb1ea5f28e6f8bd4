"""The two kinds of files: how one is made of a traced network, and how it is run."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from locallearn._version import __version__
from locallearn.errors import UserError
from locallearn.export.description import INPUT, Description
from locallearn.export.network import first_line, quietly

METADATA_KEY = "locallearn"  # of an ONNX file's metadata
EXTRA_FILE = "locallearn.json"  # in an archive of torch.export
ONNX_SUFFIX, PROGRAM_SUFFIX = ".onnx", ".pt2"

# What PyTorch's operators are written in; it makes a later opset, and not an earlier one, of it.
DEFAULT_OPSET = 18
MAX_OPSET = 23

_MAX_ONNX_BYTES = 2**31 - 1


class ExportedModel(Protocol):
    """A file that is loaded, and runs on the CPU.

    Attributes:
        description: what it says of itself.
    """

    description: Description

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Output name -> logits (N, K), float32.

        Arguments:
            images: as the description says.
        """
        ...


def load_onnx_package(name: str) -> Any:
    """onnx, onnxscript, onnxruntime or a module of them.

    Raises:
        UserError: any of the three is missing, which are needed together.
    """
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX files need onnx, onnxscript and onnxruntime, and {error.name} is missing: "
            f"pip install 'locallearn[onnx]'. Or use --format torch-export."
        ) from error


def check_opset(opset: int) -> None:
    """Raises UserError for an opset that PyTorch's exporter does not write."""
    if not DEFAULT_OPSET <= opset <= MAX_OPSET:
        raise UserError(
            f"--opset must be between {DEFAULT_OPSET} and {MAX_OPSET}, got {opset}. (PyTorch "
            f"writes its operators in opset {DEFAULT_OPSET}.)"
        )


def onnx_content(program: ExportedProgram, description: Description, opset: int) -> bytes:
    """An ONNX file, its description in the metadata under "locallearn".

    Arguments:
        program: the traced network.
        description: of it.
        opset: version of ONNX's operators.

    Raises:
        UserError: a package that is missing, an operator that ONNX does not have, an opset that
            could not be had, or a file above 2 GiB.
    """
    check_opset(opset)
    load_onnx_package("onnx")
    try:
        with quietly():
            made = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=description.output_names,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of torch's, onnxscript's and onnx' many kinds
        raise UserError(
            f"the network can't be written as ONNX: {first_line(error)}. Try another --opset, or "
            f"--format torch-export."
        ) from error
    assert made is not None
    proto = made.model_proto
    versions = {each.domain: each.version for each in proto.opset_import}
    if versions.get("") != opset:
        raise UserError(
            f"the network could not be written in opset {opset}, only in {versions.get('')}. "
            f"Give --opset {versions.get('')}."
        )
    _clean(proto)
    return serialized(proto, description)


def serialized(proto: Any, description: Description) -> bytes:
    """An ONNX model with its description, as bytes.

    Raises:
        UserError: above 2 GiB, which is more than an ONNX file can hold.
    """
    proto.producer_name, proto.producer_version = "locallearn", __version__
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, description.to_text()
    if proto.ByteSize() > _MAX_ONNX_BYTES:
        raise UserError(
            "the network is larger than the 2 GiB that an ONNX file can hold. Use --format "
            "torch-export."
        )
    content: bytes = proto.SerializeToString()
    return content


def _clean(proto: Any) -> None:
    """Leave out where in which file of this machine each node comes from; name the batch."""
    graph = proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
    del graph.metadata_props[:]


class OnnxModel:
    """An ONNX file, run by onnxruntime on the CPU.

    Arguments:
        content: the file's.
        origin: its name, for messages.
        num_threads: that it computes with; torch's where None.

    Raises:
        UserError: no ONNX file, or not one that locallearn wrote.
    """

    def __init__(
        self, content: bytes, origin: str = "the file", num_threads: int | None = None
    ) -> None:
        runtime = load_onnx_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds, which share no base of their own
            raise UserError(f"{origin} can't be read: {first_line(error)}.") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.description = Description.from_text(metadata.get(METADATA_KEY, "null"), origin)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        names = self.description.output_names
        arrays = self._session.run(names, {INPUT: images.contiguous().numpy()})
        return {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}


def program_content(program: ExportedProgram, description: Description) -> bytes:
    """An archive of torch.export, its description in the extra file "locallearn.json"."""
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: description.to_text()})
    return buffer.getvalue()


class ProgramModel:
    """An archive of torch.export, run by torch on the CPU.

    Arguments:
        content: the file's.
        origin: its name, for messages.

    Raises:
        UserError: no such archive, or not one that locallearn wrote.
    """

    def __init__(self, content: bytes, origin: str = "the file") -> None:
        extra_files = {EXTRA_FILE: ""}
        try:
            with quietly():
                program = torch.export.load(io.BytesIO(content), extra_files=extra_files)
        except Exception as error:  # torch, zipfile and json raise a dozen kinds on foreign bytes
            raise UserError(f"{origin} can't be read: {first_line(error)}.") from error
        text = extra_files[EXTRA_FILE]
        self.description = Description.from_text(text or "null", origin)
        self._module: Callable[[Tensor], dict[str, Tensor]] = program.module()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._module(images)


def load_export(path: str | Path) -> ExportedModel:
    """A file that locallearn exported, ready to run on the CPU.

    Arguments:
        path: ends in .onnx or .pt2.

    Raises:
        UserError: another name, or no such file.
        OSError: as the file system says.
    """
    path = Path(path)
    if path.suffix == ONNX_SUFFIX:
        return OnnxModel(path.read_bytes(), str(path))
    if path.suffix == PROGRAM_SUFFIX:
        return ProgramModel(path.read_bytes(), str(path))
    raise UserError(f"{path} ends in neither {ONNX_SUFFIX} nor {PROGRAM_SUFFIX}.")
