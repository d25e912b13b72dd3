"""OpenVINO's intermediate representation, two files (``.xml`` and ``.bin``): for Intel's processors."""

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.export.formats import ExportedFiles, ExportFormat, Predictor, onnx
from potstill.models.exported_files import METADATA_KEY, ExportMetadata

if TYPE_CHECKING:
    from torch import nn


def convert(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert by way of ONNX; the weights stay float32."""
    import openvino

    model = openvino.convert_model(io.BytesIO(onnx.convert_to_onnx(module, metadata)[".onnx"]))
    model.set_rt_info(metadata.as_text(), [METADATA_KEY])
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch, "model.xml")
        openvino.serialize(model, xml)
        return {".xml": xml.read_bytes(), ".bin": xml.with_suffix(".bin").read_bytes()}


def open_files(files: ExportedFiles) -> Predictor:
    """Load as a function that OpenVINO runs on the CPU in float32 (its default on some processors is bfloat16)."""
    import openvino

    core = openvino.Core()
    model = core.read_model(files[".xml"], files[".bin"])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(batch: Any) -> Any:
        return compiled([batch])[0]

    return answer


FORMAT = ExportFormat(
    convert, open_files, ".xml", packages=("openvino", "onnx", "onnxscript", "onnxruntime"), extra="openvino"
)
