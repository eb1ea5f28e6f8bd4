"""Networks as files that run without this package: ONNX and torch.export, checked against the
network they were made of.
"""

from locallearn.export.description import Description, Exit, Origin
from locallearn.export.exporting import Exported, export_onnx, export_program, quantize_onnx
from locallearn.export.files import ExportedModel, OnnxModel, ProgramModel, load_export
from locallearn.export.verification import Comparison

__all__ = [
    "Comparison",
    "Description",
    "Exit",
    "Exported",
    "ExportedModel",
    "OnnxModel",
    "Origin",
    "ProgramModel",
    "export_onnx",
    "export_program",
    "load_export",
    "quantize_onnx",
]
