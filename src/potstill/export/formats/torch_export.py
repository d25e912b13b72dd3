"""A ``torch.export`` package (``.pt2``): for PyTorch without our Python code, in C++ or ahead-of-time compiled."""

import io
from typing import TYPE_CHECKING, Any

from potstill.errors import ArtifactError
from potstill.export.formats import ExportedFiles, ExportFormat, Predictor, quiet
from potstill.models.exported_files import METADATA_KEY, ExportMetadata

if TYPE_CHECKING:
    from torch import nn


def export_program(module: "nn.Module", metadata: ExportMetadata, *, any_batch: bool = True) -> Any:
    """Return the network with its preprocessing as a ``torch.export.ExportedProgram``.

    Raises:
        ArtifactError: it has parts that cannot be exported.
    """
    import torch

    from potstill.export.preprocessing import create_preprocessing, dynamic_axes, example_input

    whole = torch.nn.Sequential(*create_preprocessing(metadata.input, metadata.inside), module).eval()
    sample = example_input(metadata.input, metadata.inside)
    shapes: Any = (dynamic_axes(metadata.inside),) if any_batch else None
    try:
        with quiet():
            return torch.export.export(whole, (sample if any_batch else sample[:1],), dynamic_shapes=shapes)
    except Exception as error:  # whatever a foreign network makes the exporter raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{metadata.architecture} cannot be exported by torch.export: {line[:300]}") from error


def convert(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.pt2`` with the metadata as an extra file ``potstill`` in it."""
    import torch

    held = io.BytesIO()
    torch.export.save(export_program(module, metadata), held, extra_files={METADATA_KEY: metadata.as_text()})
    return {".pt2": held.getvalue()}


def open_files(files: ExportedFiles) -> Predictor:
    """Load as a function that PyTorch runs; only for files that were just written."""
    import torch

    program = torch.export.load(io.BytesIO(files[".pt2"])).module()

    def answer(batch: Any) -> Any:
        with torch.no_grad():
            return program(torch.from_numpy(batch)).numpy()

    return answer


FORMAT = ExportFormat(convert, open_files, ".pt2")
