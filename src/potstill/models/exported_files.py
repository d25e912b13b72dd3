"""Networks as files of other programs: their kinds, the metadata of ``potstill export``, and ONNX files as functions.

No torch and no onnx here.

What an ONNX file declares is read from its bytes before an engine parses them.  ONNX is a protobuf message; only its
wire format is known here, and a few field numbers of onnx.proto3.

An ONNX file only computes.  The other two can do more: TorchScript has operators that write files (``aten::save``,
``aten::from_file``), and ``torch.export.load`` unpickles objects and evaluates text of the file as Python.  So they
need the same permission as code.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.code_references import PERMISSION, is_permitted
from potstill.errors import ArtifactError, UsageError, first_line
from potstill.input_spec import RESIZE_MODES, InputSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

LABELS = {
    "onnx": "an ONNX file",
    "torchscript": "a TorchScript archive",
    "torch-export": "a torch.export package",
    "table": "a table of answers",
}
EXECUTABLE = ("torchscript", "torch-export")  # which can do more than compute
SUFFIXES = {  # TorchScript has those of state dicts
    ".onnx": "onnx",
    ".pt2": "torch-export",
    ".csv": "table",
    ".parquet": "table",
    ".npz": "table",
}
METADATA_KEY = "potstill"  # in the file's own metadata
METADATA_SCHEMA = 1
PREPROCESSING_MODES = ("none", "normalise", "resize")


def identify_file(path: Path) -> str | None:
    """Return the kind of a file, one of ``LABELS``; None if it is none of them."""
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):  # another kind of file, a folder, or damaged
        return None
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else None


def check_permission(kind: str, origin: str, name: str) -> None:
    """Raise UsageError if files of this kind can run code, and neither this path nor this SHA-256 is permitted."""
    if kind in EXECUTABLE and not is_permitted(name):
        raise UsageError(
            f"{origin} is {LABELS[kind]}, which can do more than compute: opening it may write files or run code.\n"
            "If you trust its source, add --allow-code (from Python: allow_code=True), or set "
            f"{PERMISSION}=1; or export the network to ONNX, which needs no permission"
        )


@dataclass(frozen=True)
class ExportMetadata:
    """Inputs and outputs of an exported model.

    Input with ``inside`` "none": normalised float32 images [B, 3, S, S]; "normalise": uint8 pixels [B, 3, S, S] of
    images at the network's size; "resize": uint8 pixels [B, H, W, 3] of any size, equal within a batch.
    Output: logits [B, K], float32.
    """

    architecture: str
    class_names: tuple[str, ...]
    input: InputSpec
    inside: str = "none"
    int8: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object for the file's metadata and NAME.json."""
        return {"schema": METADATA_SCHEMA, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        """Return ``as_json`` as text."""
        return json.dumps(self.as_json())


def parse_metadata(text: str, origin: str) -> ExportMetadata:
    """Parse what ``as_text`` returned."""
    try:
        found = json.loads(text)
        if found.pop("schema") != METADATA_SCHEMA:
            raise ArtifactError(
                f"{origin} was exported by another version of potstill; update potstill, or export anew"
            )
        spec = InputSpec.from_dict(found.pop("input"))
        names = tuple(found.pop("class_names"))
        metadata = ExportMetadata(class_names=names, input=spec, **found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{origin}: its metadata cannot be used ({type(error).__name__}: {error})") from error
    if not _is_valid(metadata):
        raise ArtifactError(f"{origin}: its metadata has values that potstill never writes: {text[:200]}")
    return metadata


def _is_valid(metadata: ExportMetadata) -> bool:
    spec = metadata.input
    return (
        isinstance(spec.size, int)
        and 1 <= spec.size <= 4096
        and spec.resize_mode in RESIZE_MODES
        and 0.1 <= spec.crop_share <= 1
        and all(0 < each < 1e6 for each in spec.std)
        and all(abs(each) < 1e6 for each in spec.mean)
        and metadata.inside in PREPROCESSING_MODES
        and all(isinstance(name, str) for name in metadata.class_names)
        and len(set(metadata.class_names)) == len(metadata.class_names) >= 2
    )


_LOG_ERRORS_ONLY = 3  # onnxruntime's scale of log levels


def open_onnx_session(content: bytes, *, threads: int = 0, patient: bool = False) -> Any:
    """Return onnxruntime's session of a model, on the CPU, with ``threads`` for one image (0: all cores).

    ``patient`` threads do not spin, so that engines which take turns with this one are not slowed.
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
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise ArtifactError(f"onnxruntime cannot use this model: {first_line(error)}") from error


def create_onnx_predictor(
    content: bytes, *, threads: int = 0, patient: bool = False
) -> "Callable[[NDArray[Any]], NDArray[Any]]":
    """Return a function from a batch of inputs to logits [B, K], for a model of one input and one output."""
    session = open_onnx_session(content, threads=threads, patient=patient)
    (taken,) = session.get_inputs()

    def answer(batch: "NDArray[Any]") -> "NDArray[Any]":
        (logits,) = session.run(None, {taken.name: batch})
        found: NDArray[Any] = logits
        return found

    return answer


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PROPERTIES_FIELD = 14  # of ModelProto: key (1), value (2)
_MAX_DEPTH = 40

# Message -> fields that hold messages in which a tensor may stand.  A Tensor's 13 and 14 state that it lies elsewhere.
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
    """Return the metadata properties of a model; ArtifactError for tensors that lie in another file."""
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
