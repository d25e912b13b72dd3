"""Latency of exported files in their engines.  Neither torch nor the converters are needed."""

import json
import os
import platform
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ArtifactError, UsageError
from potstill.export.formats import LITERT, LITERT_METADATA, ExportFormat
from potstill.export.onnx import NCNN, ONNX, OPENVINO, check_digest, facts_path
from potstill.io import check_exists, read_bytes, read_checksummed_json
from potstill.models.exported_files import METADATA_KEY, ExportMetadata, parse_metadata, read_properties

# Suffix -> format, the engine's package, and what it is called where packages are installed.
ENGINES: dict[str, tuple[ExportFormat, str, str]] = {
    ".onnx": (ONNX, "onnxruntime", "onnxruntime"),
    ".xml": (OPENVINO, "openvino", "openvino"),
    ".tflite": (LITERT, "ai_edge_litert", "ai-edge-litert"),
    ".ncnn.param": (NCNN, "ncnn", "ncnn"),
}
_SECONDS = 20.0  # after which no further round begins, apart from the first five
_WARMUP = 5


@dataclass(frozen=True)
class Measurement:
    """Latency of one file."""

    file: str
    bytes: int  # of all of its files
    engine: str
    version: str
    batch: int
    threads: int
    rounds: int
    p50_ms: float  # for one batch
    p95_ms: float
    images_per_second: float  # by the median
    machine: str  # processor and system

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)


def benchmark(paths: Sequence[Path | str], *, batch: int = 1, threads: int = 0, rounds: int = 50) -> list[Measurement]:
    """Measure the milliseconds for one batch of random pixels, alternating between the files.

    ``paths`` are .onnx, .xml (OpenVINO), .tflite and .ncnn.param; the last two take one image.  ``threads`` 0: all
    cores. Fewer than ``rounds`` are measured if they take more than 20 s.
    """
    if batch < 1 or rounds < 1 or threads < 0:
        raise UsageError(f"batch and rounds are at least 1, threads at least 0; got {batch}, {rounds}, {threads}")
    opened = [_open(Path(path), batch, threads) for path in paths]
    times: list[list[float]] = [[] for _ in opened]
    start = time.perf_counter()
    for number in range(-_WARMUP, rounds):
        if number >= 5 and time.perf_counter() - start > _SECONDS:
            break
        for (predict, images, _), found in zip(opened, times, strict=True):
            began = time.perf_counter()
            predict(images)
            if number >= 0:
                found.append(1000 * (time.perf_counter() - began))
    return [
        Measurement(
            str(path), size, package, version(package), batch, threads or os.cpu_count() or 1, len(found),
            float(np.percentile(found, 50)), float(np.percentile(found, 95)),
            float(1000 * batch / np.percentile(found, 50)), _machine(),
        )
        for path, (_, _, (package, size)), found in zip(paths, opened, times, strict=True)
    ]  # fmt: skip


def _open(path: Path, batch: int, threads: int) -> tuple[Callable[[NDArray[Any]], Any], NDArray[Any], tuple[str, int]]:
    """Return the file as a function, its input, the engine's package, and its bytes."""
    suffix = next((each for each in ENGINES if path.name.endswith(each)), None)
    if suffix is None:
        raise UsageError(
            f"{path}: no engine measures such files; known are {', '.join(ENGINES)}, as potstill export writes them"
        )
    form, module, package = ENGINES[suffix]
    if batch > 1 and not form.any_batch:
        raise UsageError(f"{path}: {suffix} files take one image at a time, so --batch is 1, got {batch}")
    check_exists(path, "files that potstill export has written")
    stem = path.name.removesuffix(suffix)
    suffixes = {".xml": (".xml", ".bin"), ".ncnn.param": (".ncnn.param", ".ncnn.bin")}.get(suffix, (suffix,))
    files = {each: read_bytes(path.with_name(f"{stem}{each}")) for each in suffixes}
    for each, content in files.items():
        check_digest(path, f"{stem}{each}", content)
    metadata = _read_metadata(path, suffix, files)
    try:
        assert form.open is not None
        predict = form.open(files, threads=threads)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise UsageError(
            f"{path}: measuring it needs {package}, not installed here\nInstall: pip install {package}"
        ) from None
    size = metadata.input.size
    shape = (batch, size, size, 3) if metadata.inside == "resize" else (batch, 3, size, size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = pixels if metadata.inside != "none" else (pixels / np.float32(127.5) - np.float32(1)).astype(np.float32)
    return predict, images, (package, sum(map(len, files.values())))


def _read_metadata(path: Path, suffix: str, files: dict[str, bytes]) -> ExportMetadata:
    text = None
    if facts_path(path).is_file():
        facts = read_checksummed_json(facts_path(path))
        names = ("architecture", "class_names", "input", "inside", "int8")
        text = json.dumps({"schema": 1, **{key: facts.get(key) for key in names}})
    elif suffix == ".onnx":
        text = read_properties(files[suffix], str(path)).get(METADATA_KEY)
    elif suffix == ".tflite" and zipfile.is_zipfile(BytesIO(files[suffix])):
        with zipfile.ZipFile(BytesIO(files[suffix])) as appended:
            text = appended.read(LITERT_METADATA).decode() if LITERT_METADATA in appended.namelist() else None
    if text is None:
        raise ArtifactError(
            f"{path} does not describe its input: copy {facts_path(path).name}, which potstill export wrote, beside it"
        )
    return parse_metadata(text, str(path))


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {platform.system()} {platform.machine()}"
