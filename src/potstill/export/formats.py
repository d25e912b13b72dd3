"""Export formats: torch.export, ExecuTorch, LiteRT, Core ML.

torch and the converters are imported by the functions that need them.
"""

import contextlib
import io
import logging
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from potstill.console import silence_native_stderr
from potstill.errors import ArtifactError, first_line, root_cause_line, storage_error
from potstill.models.exported_files import METADATA_KEY, PREPROCESSING_MODES, ExportMetadata

if TYPE_CHECKING:
    from torch import nn


ExportedFiles = Mapping[str, bytes]  # suffix -> content
Predictor = Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]


@dataclass(frozen=True)
class ExportFormat:
    """An export format.

    Attributes:
        convert: converts a network in eval mode on the CPU, images [B, 3, S, S] -> logits [B, K], to the content of a
            file for each suffix.
        open: loads the result of ``convert`` as a function; None if such files run only on other machines.  Its
            argument ``threads`` is for one image; 0: as many as cores.
        suffix: of the file to open.
        packages: required modules.
        extra: of potstill, which installs them.
        inside: preprocessing that can be part of the file.
        any_batch: whether a file takes batches of any size; else one image at a time.
        from_onnx: makes the files of the content of an ONNX file; None if the format is not made of one.  Such formats
            can be int8.
    """

    convert: "Callable[[nn.Module, ExportMetadata], ExportedFiles]"
    open: Callable[..., Predictor] | None
    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = "export"
    inside: tuple[str, ...] = PREPROCESSING_MODES
    any_batch: bool = True
    from_onnx: Callable[[bytes, ExportMetadata], ExportedFiles] | None = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, discard warnings, log lines up to WARNING and prints of converters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def converting(failure: str) -> Iterator[None]:
    """Be ``quiet`` within the block; whatever a converter raises becomes an ArtifactError, ``failure: REASON``."""
    try:
        with quiet():
            yield
    except ArtifactError:
        raise
    except Exception as error:
        if (storage := storage_error(error)) is not None:
            raise storage from error
        raise ArtifactError(f"{failure}: {root_cause_line(error)}") from error


def export_program(module: "nn.Module", metadata: ExportMetadata, *, any_batch: bool = True) -> Any:
    """Return the network with its preprocessing as a ``torch.export.ExportedProgram``."""
    import torch

    from potstill.export.preprocessing import create_preprocessing, dynamic_axes, example_input

    whole = torch.nn.Sequential(*create_preprocessing(metadata.input, metadata.inside), module).eval()
    sample = example_input(metadata.input, metadata.inside)
    shapes: Any = (dynamic_axes(metadata.inside),) if any_batch else None
    with converting(f"{metadata.architecture} cannot be exported by torch.export"):
        return torch.export.export(whole, (sample if any_batch else sample[:1],), dynamic_shapes=shapes)


def convert_to_torch_export(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.pt2``, for PyTorch in C++ or compiled ahead of time, with the metadata as a file in it."""
    import torch

    held = io.BytesIO()
    torch.export.save(export_program(module, metadata), held, extra_files={METADATA_KEY: metadata.as_text()})
    return {".pt2": held.getvalue()}


def open_torch_export_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that PyTorch runs on its own threads; only for files that were just written."""
    import torch

    with quiet():  # torch 2.11 warns of its own buffers
        program = torch.export.load(io.BytesIO(files[".pt2"])).module()

    def answer(batch: Any) -> Any:
        with torch.no_grad():
            return program(torch.from_numpy(batch)).numpy()

    return answer


TORCH_EXPORT = ExportFormat(convert_to_torch_export, open_torch_export_files, ".pt2")


def convert_to_executorch(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.pte`` with XNNPACK, for one image at a time; class names are only in NAME.json."""
    program = export_program(module, metadata, any_batch=False)
    with converting(f"{metadata.architecture} cannot be converted to ExecuTorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return {".pte": bytes(lowered.to_executorch().buffer)}


def open_executorch_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that ExecuTorch's runtime runs on its own threads."""
    import torch

    with silence_native_stderr(), quiet():  # its C++ writes about files of ARM processors
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(files[".pte"]).load_method("forward")

    def answer(batch: Any) -> Any:
        return method.execute([torch.from_numpy(batch)])[0].numpy()

    return answer


EXECUTORCH = ExportFormat(
    convert_to_executorch,
    open_executorch_files,
    ".pte",
    packages=("executorch",),
    extra="executorch",
    inside=("none", "normalise"),
    any_batch=False,
)


_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # of a zip's time: the same model gives the same bytes


def convert_to_litert(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.tflite``, for one image at a time, in float32.

    The file ends with a zip of ``labels.txt``, as Android's tools append it, and of the metadata, ``potstill.json``.
    """
    program = export_program(module, metadata, any_batch=False)
    try:
        with silence_native_stderr(), quiet():
            import litert_torch

            converted = litert_torch.convert(program.module(), program.example_inputs[0])
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch, "model.tflite")
                converted.export(str(path))
                content = path.read_bytes()
    except Exception as error:  # whatever a foreign network makes the converter raise
        line = first_line(error)
        if missing := re.search(r"Lowering not found: (aten[.](\w+)[\w.]*)", str(error)):
            line = f"it has no operation for {missing[1]}, which {find_layer(program, missing[2])} uses\n{OTHER_WAYS}"
        raise ArtifactError(f"{metadata.architecture} cannot be converted to LiteRT: {line}") from error
    held = io.BytesIO(content)
    with zipfile.ZipFile(held, "a") as appended:
        for name, text in (
            ("labels.txt", "".join(" ".join(name.split()) + "\n" for name in metadata.class_names)),
            (LITERT_METADATA, metadata.as_text()),
        ):
            appended.writestr(zipfile.ZipInfo(name, _ZIP_TIME), text)
    return {".tflite": held.getvalue()}


LITERT_METADATA = f"{METADATA_KEY}.json"
OTHER_WAYS = "Try --format onnx, which has more operations, or train a convolutional student"


def find_layer(program: Any, operation: str) -> str:
    """Return "the layer PATH (CLASS)" that uses an operation of ``torch.ops.aten``, by the beginning of its name."""
    for each in (program, program.run_decompositions()):
        for node in each.graph.nodes:
            if str(node.target).startswith(f"aten.{operation}") and node.meta.get("nn_module_stack"):
                path, kind = list(node.meta["nn_module_stack"].values())[-1]
                inside = path.partition(".")[2]
                return f"the layer {inside} ({kind.rpartition('.')[2]})" if inside else "the network itself"
    return "a layer"


def open_litert_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that LiteRT's interpreter runs on the CPU."""
    with silence_native_stderr(), quiet():
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_content=files[".tflite"], num_threads=threads or os.cpu_count())
        interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def answer(batch: Any) -> Any:
        interpreter.set_tensor(taken, batch)
        interpreter.invoke()
        return interpreter.get_tensor(given)

    return answer


LITERT = ExportFormat(
    convert_to_litert,
    open_litert_files,
    ".tflite",
    packages=("ai_edge_litert", "litert_torch"),
    extra="litert",
    inside=("none", "normalise"),
    any_batch=False,
)


def convert_to_coreml(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to a zip of the ``.mlpackage`` folder, for Apple's devices, for one image at a time, in float32."""
    with converting(f"{metadata.architecture} cannot be converted to Core ML"):
        import coremltools

        program = export_program(module, metadata, any_batch=False).run_decompositions({})
        model = coremltools.convert(
            program, convert_to="mlprogram", compute_precision=coremltools.precision.FLOAT32, skip_model_load=True
        )
    model.user_defined_metadata[METADATA_KEY] = metadata.as_text()
    held = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as packed:
        package = Path(scratch, "model.mlpackage")
        model.save(str(package))
        for path in sorted(each for each in package.rglob("*") if each.is_file()):
            name = path.relative_to(scratch).as_posix()
            packed.writestr(zipfile.ZipInfo(name, _ZIP_TIME), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return {".mlpackage.zip": held.getvalue()}


COREML = ExportFormat(
    convert_to_coreml,
    None,
    ".mlpackage.zip",
    packages=("coremltools",),
    extra="coreml",
    inside=("none",),
    any_batch=False,
)
