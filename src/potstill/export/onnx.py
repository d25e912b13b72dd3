"""ONNX, one file: for onnxruntime and most other engines; writing, checking, loading and running it.

Loading needs numpy, Pillow and onnxruntime only: no torch and no onnx at the top of this module.  What a file declares
is read from its bytes before an engine parses them.  ONNX is a protobuf message; only its wire format is known here,
and a few field numbers of onnx.proto3.
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.image_io import Pixels
from potstill.data.preprocessing import crop_to_input, normalize_array
from potstill.errors import ArtifactError, UsageError
from potstill.export.formats import (
    METADATA_KEY,
    ExportedFiles,
    ExportFormat,
    ExportMetadata,
    Predictor,
    parse_metadata,
    quiet,
)
from potstill.io import DAMAGED, read_bytes, read_checksummed_json, sha256_hex

if TYPE_CHECKING:
    from torch import nn


_LOG_ERRORS_ONLY = 3  # onnxruntime's scale of log levels


def create_onnx_predictor(
    content: bytes, *, threads: int = 0, patient: bool = False
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return a function from a batch of inputs to logits [B, K].

    Args:
        content: of an ONNX file; what it refers to outside of itself is not there.
        threads: for one image; 0: as many as cores.
        patient: threads that wait do not spin, so that other engines which take turns with this one are not slowed.

    Raises:
        UsageError: onnxruntime is not installed.
        ArtifactError: onnxruntime cannot use it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        needs = "an ONNX model needs onnxruntime, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[export]", or pip install onnxruntime') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.intra_op_num_threads = threads
    if patient:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"onnxruntime cannot use this model: {line[:300]}") from error
    (taken,) = session.get_inputs()

    def answer(batch: NDArray[Any]) -> NDArray[Any]:
        (logits,) = session.run(None, {taken.name: batch})
        found: NDArray[Any] = logits
        return found

    return answer


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PROPERTIES_FIELD = 14  # of ModelProto: key (1), value (2)
_MAX_DEPTH = 40

# Message -> fields that hold messages in which a tensor may stand.  A Tensor's 13 and 14 say that it lies elsewhere.
_TENSOR_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA_FIELDS = (13, 14)


def read_properties(content: bytes, origin: str) -> dict[str, str]:
    """Return the metadata properties of a model, and check that it contains all of its tensors.

    Args:
        content: of an ONNX file.
        origin: what messages call it.

    Raises:
        ArtifactError: no protobuf, or a tensor that lies in another file.
    """
    found: dict[str, str] = {}
    view = memoryview(content)
    try:
        if _has_external_data(view, "model", 0):
            raise ArtifactError(
                f"{origin} keeps its weights in another file, which potstill does not follow; "
                "save it as one file, or export it anew with potstill export"
            )
        for number, value in _fields(view):
            if number == _PROPERTIES_FIELD and isinstance(value, memoryview):
                pair = {key: bytes(text) for key, text in _fields(value) if isinstance(text, memoryview)}
                found[pair.get(1, b"").decode()] = pair.get(2, b"").decode()
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{origin} is no ONNX model, or is damaged ({error})") from None
    return found


def _has_external_data(message: memoryview, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind == "tensor":
        return any(
            number == _EXTERNAL_DATA_FIELDS[0] or (number == _EXTERNAL_DATA_FIELDS[1] and value)
            for number, value in _fields(message)
        )
    inside = _TENSOR_FIELDS[kind]
    return any(
        _has_external_data(value, inside[number], depth + 1)
        for number, value in _fields(message)
        if number in inside and isinstance(value, memoryview)
    )


def _fields(message: memoryview) -> Iterator[tuple[int, "memoryview | int"]]:
    """Yield (field number, value) of a message in order; fixed-width numbers as bytes."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if number == 0 or length > end - at:
            raise ValueError("cut short")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxModel:
    """An exported ONNX model."""

    metadata: ExportMetadata
    predictor: Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]

    def prepare(self, pixels: Pixels) -> NDArray[Any]:
        """Preprocess a decoded image, uint8 [H, W, 3], for ``probabilities``.

        If the file takes images of any size, this returns its logits already, so that no large images are kept.
        """
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
    """Load a file that ``potstill export`` wrote.

    No code in it runs and it refers to no other file.  If its ``NAME.json`` exists, the SHA-256 is compared before
    anything is parsed.

    Raises:
        ArtifactError: the file is missing, damaged, in several parts, or not from potstill.
        UsageError: onnxruntime is not installed.
    """
    content = read_bytes(path)
    _check_digest(path, content)
    found = read_properties(content, str(path))
    if METADATA_KEY not in found:
        raise ArtifactError(
            f"{path} was not exported by potstill: it has no metadata with its classes and preprocessing; "
            "export a run with potstill export RUN"
        )
    metadata = parse_metadata(found[METADATA_KEY], str(path))
    return OnnxModel(metadata, create_onnx_predictor(content))


def facts_path(path: Path) -> Path:
    """Return the path of the NAME.json of an exported file."""
    return path.with_name(f"{path.name}.json")


def _check_digest(path: Path, content: bytes) -> None:
    facts = facts_path(path)
    if not facts.is_file():
        return
    files = read_checksummed_json(facts).get("files")
    known = files.get(path.name) if isinstance(files, dict) else None  # None: it was renamed by hand
    if isinstance(known, dict) and known.get("sha256") != sha256_hex(content):
        raise ArtifactError(f"{path} {DAMAGED}; export it anew")


INPUT_NAME, OUTPUT_NAME = "images", "logits"
_MAX_BYTES = 2**31 - 1  # bytes of one protobuf message
_PREPROCESSED_NAME = "prepared"


def convert_to_onnx(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to one ``.onnx`` with a dynamic batch size and the metadata.

    Raises:
        ArtifactError: the network has parts that cannot be exported, or needs more than 2 GiB.
    """
    return {".onnx": finalize_model(export_graph(module, metadata), metadata)}


def export_graph(module: "nn.Module", metadata: ExportMetadata) -> Any:
    """Return the network without preprocessing as an ``onnx.ModelProto``: float32 [B, 3, S, S] -> logits [B, K].

    Raises:
        ArtifactError: it has parts that cannot be exported.
    """
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
    """Return the checked file, with preprocessing before the network if requested.

    Args:
        network: an ``onnx.ModelProto``, as ``export_graph`` gives it, or a quantized one.
        metadata: of the file.

    Raises:
        ArtifactError: above 2 GiB, or refused by ONNX's own checker.
    """
    import onnx

    model = network if metadata.inside == "none" else _add_preprocessing(network, metadata)
    _drop_source_paths(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.as_text()})
    model.producer_name, model.producer_version, model.doc_string = METADATA_KEY, "", ""
    if model.ByteSize() > _MAX_BYTES:
        raise ArtifactError(f"{metadata.architecture} needs more than the 2 GiB that one ONNX file can hold")
    content: bytes = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # the checker and its shape inference have several classes of their own
        raise ArtifactError(f"the ONNX checker refuses {metadata.architecture}: {_first_line(error)}") from error
    return content


def _add_preprocessing(network: Any, metadata: ExportMetadata) -> Any:
    import onnx

    from potstill.export.preprocessing import create_preprocessing, dynamic_axes, example_input

    before = create_preprocessing(metadata.input, metadata.inside).eval()
    first = _run_exporter(
        before,
        example_input(metadata.input, metadata.inside),
        dynamic_axes(metadata.inside),
        "preparation",
        INPUT_NAME,
        _PREPROCESSED_NAME,
    )
    first.ir_version = network.ir_version
    for name in sorted({each.domain for each in network.opset_import} - {each.domain for each in first.opset_import}):
        version = next(each.version for each in network.opset_import if each.domain == name)
        first.opset_import.append(onnx.helper.make_opsetid(name, version))
    prefixed = onnx.compose.add_prefix(first, "prepare/", rename_inputs=False, rename_outputs=False)
    network = onnx.compose.add_prefix(network, "network/", rename_outputs=False)
    return onnx.compose.merge_models(prefixed, network, io_map=[(_PREPROCESSED_NAME, f"network/{INPUT_NAME}")])


def _run_exporter(module: "nn.Module", sample: Any, axes: dict[int, Any], name: str, taken: str, given: str) -> Any:
    import torch

    try:
        with quiet():
            program = torch.onnx.export(
                module, (sample,), dynamo=True, dynamic_shapes=(axes,), input_names=[taken], output_names=[given],
                external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # whatever a foreign network makes the exporter raise
        raise ArtifactError(f"{name} cannot be exported to ONNX: {_first_line(error)}") from error
    assert program is not None
    return program.model_proto


def _drop_source_paths(graph: Any) -> None:
    """Remove the exporter's stack traces, which contain paths of this machine."""
    for each in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del each.metadata_props[:]
        each.doc_string = ""
    graph.doc_string = ""
    del graph.metadata_props[:]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def open_onnx_files(files: ExportedFiles) -> Any:
    """Load as a function that onnxruntime runs."""
    return create_onnx_predictor(files[".onnx"])


ONNX = ExportFormat(convert_to_onnx, open_onnx_files, ".onnx", packages=("onnx", "onnxscript", "onnxruntime"))


def convert_to_openvino(module: "nn.Module", metadata: ExportMetadata) -> ExportedFiles:
    """Convert to ``.xml`` and ``.bin``, for Intel's processors, by way of ONNX; the weights stay float32."""
    import openvino

    model = openvino.convert_model(io.BytesIO(convert_to_onnx(module, metadata)[".onnx"]))
    model.set_rt_info(metadata.as_text(), [METADATA_KEY])
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch, "model.xml")
        openvino.serialize(model, xml)
        return {".xml": xml.read_bytes(), ".bin": xml.with_suffix(".bin").read_bytes()}


def open_openvino_files(files: ExportedFiles) -> Predictor:
    """Load as a function that OpenVINO runs on the CPU in float32 (its default on some processors is bfloat16)."""
    import openvino

    core = openvino.Core()
    model = core.read_model(files[".xml"], files[".bin"])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(batch: Any) -> Any:
        return compiled([batch])[0]

    return answer


OPENVINO = ExportFormat(
    convert_to_openvino,
    open_openvino_files,
    ".xml",
    packages=("openvino", "onnx", "onnxscript", "onnxruntime"),
    extra="openvino",
)
