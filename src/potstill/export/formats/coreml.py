"""Core ML (``.mlpackage``, zipped): for Apple's devices, on which alone it runs."""

import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.errors import ArtifactError
from potstill.export.formats import ExportedFiles, ExportFormat, quiet
from potstill.export.formats.torch_export import export_program
from potstill.models.exported_files import METADATA_KEY, ExportMetadata

if TYPE_CHECKING:
    from torch import nn


_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # of a zip's time: the same model gives the same bytes


def convert(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to a zip of the ``.mlpackage`` folder, for one image at a time, in float32."""
    try:
        with quiet():
            import coremltools

            program = export_program(module, metadata, any_batch=False).run_decompositions({})
            model = coremltools.convert(
                program, convert_to="mlprogram", compute_precision=coremltools.precision.FLOAT32, skip_model_load=True
            )
    except ArtifactError:
        raise
    except Exception as error:  # whatever a foreign network makes the converter raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{metadata.architecture} cannot be converted to Core ML: {line[:300]}") from error
    model.user_defined_metadata[METADATA_KEY] = metadata.as_text()
    held = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as packed:
        package = Path(scratch, "model.mlpackage")
        model.save(str(package))
        for path in sorted(each for each in package.rglob("*") if each.is_file()):
            name = path.relative_to(scratch).as_posix()
            packed.writestr(zipfile.ZipInfo(name, _ZIP_TIME), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return {".mlpackage.zip": held.getvalue()}


FORMAT = ExportFormat(
    convert, None, ".mlpackage.zip", packages=("coremltools",), extra="coreml", inside=("none",), any_batch=False
)
