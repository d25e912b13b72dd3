"""ONNX, one file: for onnxruntime and most other engines; writing, checking, loading and running it.

OpenVINO and ncnn are made of it.

Loading needs numpy, Pillow and onnxruntime only: no torch and no onnx at the top of this module.
"""

import functools
import io
import os
import re
import subprocess  # nosec B404 # starts pnnx
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.console import silence_native_stderr
from potstill.data.image_io import Pixels
from potstill.data.preprocessing import crop_to_input, normalize_array
from potstill.errors import ArtifactError, first_line
from potstill.export.formats import (
    OTHER_WAYS,
    ExportedFiles,
    ExportFormat,
    Predictor,
    converting,
    export_program,
    find_layer,
)
from potstill.input_spec import InputSpec
from potstill.io import DAMAGED, check_exists, read_bytes, read_checksummed_json, sha256_hex
from potstill.models.exported_files import (
    METADATA_KEY,
    ExportMetadata,
    create_onnx_predictor,
    parse_metadata,
    read_properties,
)

if TYPE_CHECKING:
    from torch import nn


ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxModel:
    """An exported ONNX model."""

    metadata: ExportMetadata
    predictor: Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]

    def prepare(self, pixels: Pixels) -> NDArray[Any]:
        """Preprocess an image, uint8 [H, W, 3]; return its logits already if the file takes any size."""
        prepared = prepare_batch([pixels], self.metadata)
        result: NDArray[Any] = (self.predictor(prepared) if self.metadata.inside == "resize" else prepared)[0]
        return result

    def probabilities(self, prepared: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """Return probabilities [B, K] for outputs of ``prepare``."""
        images = np.stack(prepared)
        logits = (images if self.metadata.inside == "resize" else self.predictor(images)).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities


def prepare_batch(images: Sequence[Pixels], metadata: ExportMetadata) -> NDArray[Any]:
    """Return the model's input for decoded images, uint8 [H, W, 3] each; for "resize" all of one size."""
    if metadata.inside == "resize":
        return np.stack(images)
    pixels = np.stack([crop_to_input(each, metadata.input) for each in images])
    return pixels if metadata.inside == "normalise" else normalize_array(pixels, metadata.input)


def load_onnx(path: Path) -> OnnxModel:
    """Load a file that ``potstill export`` wrote, after comparing the SHA-256 of its ``NAME.json``; it runs no code."""
    check_exists(path, "a run folder, or a file that potstill export has written")
    content = read_bytes(path)
    check_digest(path, path.name, content)
    found = read_properties(content, str(path))
    if METADATA_KEY not in found:
        raise ArtifactError(
            f"{path} was not exported by potstill: it has no metadata with its classes and preprocessing; "
            "export a run with potstill export RUN"
        )
    model = OnnxModel(parse_metadata(found[METADATA_KEY], str(path)), create_onnx_predictor(content))
    _check_metadata(model, path)
    return model


def _check_metadata(model: OnnxModel, path: Path) -> None:
    """Raise ArtifactError if the network takes or gives something else than its metadata states."""
    size, classes = model.metadata.input.size, len(model.metadata.class_names)
    blank = prepare_batch([np.zeros((size, size, 3), np.uint8)], model.metadata)
    try:
        shape = model.predictor(blank).shape
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise ArtifactError(
            f"{path}: its network does not take the images of its metadata, {list(blank.shape)} {blank.dtype}; export "
            f"it anew ({first_line(error)})"
        ) from error
    if shape != (1, classes):
        raise ArtifactError(
            f"{path}: its metadata names {classes} classes, and its network has {shape[-1]} outputs; export it anew"
        )


def facts_path(path: Path) -> Path:
    """Return the path of the NAME.json of an exported file."""
    return path.with_name(f"{path.name}.json")


def check_digest(path: Path, name: str, content: bytes) -> None:
    """Raise ArtifactError if the content of a file is not that of which NAME.json of ``path`` has the SHA-256."""
    facts = facts_path(path)
    if not facts.is_file():
        return
    files = read_checksummed_json(facts).get("files")
    known = files.get(name) if isinstance(files, dict) else None  # None: it was renamed by hand
    if isinstance(known, dict) and known.get("sha256") != sha256_hex(content):
        raise ArtifactError(f"{path.with_name(name)} {DAMAGED}; export it anew")


INPUT_NAME, OUTPUT_NAME = "images", "logits"
_MAX_BYTES = 2**31 - 1  # bytes of one protobuf message
_PREPROCESSED_NAME = "prepared"


def convert_to_onnx(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.onnx`` with a dynamic batch size and the metadata."""
    return {".onnx": finalize_model(export_graph(module, metadata), metadata)}


def export_graph(module: "nn.Module", metadata: ExportMetadata) -> Any:
    """Return the network without preprocessing as an ``onnx.ModelProto``: float32 [B, 3, S, S] -> logits [B, K]."""
    from potstill.export.preprocessing import dynamic_axes, example_input

    return _run_exporter(
        module,
        example_input(metadata.input, "none"),
        dynamic_axes("none"),
        metadata.architecture,
        INPUT_NAME,
        OUTPUT_NAME,
    )


def finalize_model(network: Any, metadata: ExportMetadata) -> bytes:
    """Return the checked file of an ``onnx.ModelProto``, with preprocessing before the network if requested."""
    import onnx

    model = network if metadata.inside == "none" else _add_preprocessing(network, metadata)
    _drop_source_paths(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.as_text()})
    model.producer_name, model.producer_version, model.doc_string = METADATA_KEY, "", ""
    if model.ByteSize() > _MAX_BYTES:
        raise ArtifactError(f"{metadata.architecture} needs more than the 2 GiB that one ONNX file can hold")
    content: bytes = model.SerializeToString(deterministic=True)
    with converting(f"the ONNX checker refuses {metadata.architecture}"):
        onnx.checker.check_model(content, full_check=True)
    return content


def _add_preprocessing(network: Any, metadata: ExportMetadata) -> Any:
    import onnx

    first = onnx.ModelProto.FromString(_export_preprocessing(metadata.input, metadata.inside))
    first.ir_version = network.ir_version
    for name in sorted({each.domain for each in network.opset_import} - {each.domain for each in first.opset_import}):
        version = next(each.version for each in network.opset_import if each.domain == name)
        first.opset_import.append(onnx.helper.make_opsetid(name, version))
    prefixed = onnx.compose.add_prefix(first, "prepare/", rename_inputs=False, rename_outputs=False)
    network = onnx.compose.add_prefix(network, "network/", rename_outputs=False)
    return onnx.compose.merge_models(prefixed, network, io_map=[(_PREPROCESSED_NAME, f"network/{INPUT_NAME}")])


@functools.lru_cache(maxsize=8)
def _export_preprocessing(spec: InputSpec, inside: str) -> bytes:
    """Return the network's preprocessing as an ONNX file; to export it takes as long as a small network."""
    from potstill.export.preprocessing import create_preprocessing, dynamic_axes, example_input

    module, sample = create_preprocessing(spec, inside).eval(), example_input(spec, inside)
    exported = _run_exporter(module, sample, dynamic_axes(inside), "preparation", INPUT_NAME, _PREPROCESSED_NAME)
    content: bytes = exported.SerializeToString()
    return content


def _run_exporter(module: "nn.Module", sample: Any, axes: dict[int, Any], name: str, taken: str, given: str) -> Any:
    import torch

    with converting(f"{name} cannot be exported to ONNX"):
        program = torch.onnx.export(
            module, (sample,), dynamo=True, dynamic_shapes=(axes,), input_names=[taken], output_names=[given],
            external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def _drop_source_paths(graph: Any) -> None:
    """Remove the exporter's stack traces, which contain paths of this machine."""
    for each in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del each.metadata_props[:]
        each.doc_string = ""
    graph.doc_string = ""
    del graph.metadata_props[:]


def open_onnx_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that onnxruntime runs; its threads leave the processor to other engines between calls."""
    return create_onnx_predictor(files[".onnx"], threads=threads, patient=True)


ONNX = ExportFormat(
    convert_to_onnx,
    open_onnx_files,
    ".onnx",
    packages=("onnx", "onnxscript", "onnxruntime"),
    from_onnx=lambda content, metadata: {".onnx": content},
)


def convert_to_openvino(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to ``.xml`` and ``.bin``, for Intel's processors, by way of ONNX; the weights stay float32."""
    return onnx_to_openvino(convert_to_onnx(module, metadata)[".onnx"], metadata)


def onnx_to_openvino(content: bytes, metadata: ExportMetadata) -> ExportedFiles:
    """Convert an ONNX file, in float32 or int8, to ``.xml`` and ``.bin``."""
    openvino = _import_openvino()
    model = openvino.convert_model(io.BytesIO(content))
    model.set_rt_info(metadata.as_text(), [METADATA_KEY])
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch, "model.xml")
        openvino.serialize(model, xml)
        return {".xml": xml.read_bytes(), ".bin": xml.with_suffix(".bin").read_bytes()}


def _import_openvino() -> Any:
    """Import OpenVINO; without its telemetry, which reports each import and conversion unless it cannot be imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def open_openvino_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that OpenVINO runs on the CPU in float32 (its default on some processors is bfloat16)."""
    openvino = _import_openvino()
    core = openvino.Core()
    model = core.read_model(files[".xml"], files[".bin"])
    compiled = core.compile_model(
        model,
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
    )

    def answer(batch: Any) -> Any:
        return compiled([batch])[0]

    return answer


OPENVINO = ExportFormat(
    convert_to_openvino,
    open_openvino_files,
    ".xml",
    packages=("openvino", "onnx", "onnxscript", "onnxruntime"),
    extra="openvino",
    from_onnx=onnx_to_openvino,
)


def convert_to_ncnn(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to ``.ncnn.param`` and ``.ncnn.bin`` by pnnx, by way of ONNX; for one image at a time, in float32.

    ncnn takes floats: with "normalise" pixels from 0 to 255 [3, S, S], as its ``Mat::from_pixels`` makes them.
    """
    import onnx
    import pnnx
    import torch

    from potstill.export.preprocessing import create_preprocessing, example_input

    sample = example_input(metadata.input, "none")[:1]
    whole = torch.nn.Sequential(*create_preprocessing(metadata.input, metadata.inside), module).eval()
    graph = _run_exporter(whole, sample, {}, metadata.architecture, INPUT_NAME, OUTPUT_NAME)
    shape = ",".join(map(str, sample.shape))
    with tempfile.TemporaryDirectory() as scratch:
        onnx.save(graph, str(Path(scratch, "model.onnx")))
        done = subprocess.run(  # nosec B603 # pnnx's own program, with a fixed command line
            [pnnx.EXEC_PATH, "model.onnx", f"inputshape=[{shape}]", "fp16=0"],
            cwd=scratch, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        found = [Path(scratch, f"model.ncnn.{part}") for part in ("param", "bin")]
        if not all(each.is_file() for each in found):
            line = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
            raise ArtifactError(f"pnnx cannot convert {metadata.architecture} to ncnn: {line[:300]}")
        param, weights = (each.read_bytes() for each in found)
    if missing := _missing_operations(param.decode()):
        layer = find_layer(export_program(module, metadata, any_batch=False), re.split(r"\W+", missing[0])[-1])
        raise ArtifactError(
            f"{metadata.architecture} cannot be converted to ncnn, which has no operation for {missing[0]} as {layer} "
            f"uses it\n{OTHER_WAYS}"
        )
    return {".ncnn.param": param, ".ncnn.bin": weights}


def _missing_operations(param: str) -> list[str]:
    """Return the layers that ncnn lacks, which pnnx writes by their names in PyTorch; reshapes come last."""
    rows = [line.split()[:2] for line in param.splitlines()[2:]]
    foreign = [(kind, name) for kind, name in rows if "." in kind or "::" in kind]
    return [kind for kind, name in sorted(foreign, key=lambda row: "_ncnnbatch" in row[1])]


def open_ncnn_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load as a function that ncnn runs on the CPU in float32 (its default is 16 bits)."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads or os.cpu_count() or 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as scratch, silence_native_stderr():
        for suffix, content in files.items():
            Path(scratch, f"model{suffix}").write_bytes(content)
        loaded = net.load_param(str(Path(scratch, "model.ncnn.param")))
        loaded = loaded or net.load_model(str(Path(scratch, "model.ncnn.bin")))
    if loaded != 0:
        raise ArtifactError("ncnn cannot load this model")

    def answer(batch: Any) -> Any:
        (image,) = batch
        pixels = np.ascontiguousarray(image, np.float32)  # with a name, since ncnn's Mat does not keep it alive
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(pixels))
        failed, logits = extractor.extract("out0")
        if failed:
            raise ArtifactError("ncnn cannot run this model")
        return np.array(logits)[None]

    return answer


NCNN = ExportFormat(
    convert_to_ncnn,
    open_ncnn_files,
    ".ncnn.param",
    packages=("ncnn", "pnnx", "onnx", "onnxscript"),
    extra="ncnn",
    inside=("none", "normalise"),
    any_batch=False,
)
