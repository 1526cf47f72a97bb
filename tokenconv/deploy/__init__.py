"""Models leave Python: ONNX, ``torch.export`` and AOTInductor, each checked before it is kept."""

from tokenconv.deploy.exporting import Checked, ExportReport, export
from tokenconv.deploy.quantization import (
    KeepFloat,
    Quantization,
    QuantizationReport,
    quantize_,
)
from tokenconv.deploy.targets import Target

__all__ = [
    "Checked",
    "ExportReport",
    "KeepFloat",
    "Quantization",
    "QuantizationReport",
    "Target",
    "export",
    "quantize_",
]
