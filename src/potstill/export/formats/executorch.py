"""ExecuTorch (``.pte``), with XNNPACK: for phones and small boards."""

from typing import TYPE_CHECKING, Any

from potstill.errors import ArtifactError
from potstill.export.formats import ExportedFiles, ExportFormat, Predictor, quiet
from potstill.export.formats.torch_export import export_program
from potstill.models.exported_files import ExportMetadata

if TYPE_CHECKING:
    from torch import nn


def convert(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.pte`` for one image at a time; class names and preprocessing are only in NAME.json."""
    program = export_program(module, metadata, any_batch=False)
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return {".pte": bytes(lowered.to_executorch().buffer)}
    except Exception as error:  # whatever a foreign network makes the converter raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{metadata.architecture} cannot be converted to ExecuTorch: {line[:300]}") from error


def open_files(files: ExportedFiles) -> Predictor:
    """Load as a function that ExecuTorch's runtime runs."""
    import torch

    with quiet():
        from executorch.runtime import Runtime

    method = Runtime.get().load_program(files[".pte"]).load_method("forward")

    def answer(batch: Any) -> Any:
        return method.execute([torch.from_numpy(batch)])[0].numpy()

    return answer


FORMAT = ExportFormat(
    convert,
    open_files,
    ".pte",
    packages=("executorch",),
    extra="executorch",
    inside=("none", "normalise"),
    any_batch=False,
)
