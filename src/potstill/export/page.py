"""A web page in one file: network, preprocessing and onnxruntime-web, which classifies images without a network."""

import base64
import gzip
import io
import json
import re
import shutil
import subprocess  # nosec B404 # starts npm
import tarfile
import tempfile
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path

from potstill.data.preprocessing import decoded_side, scale_and_shift
from potstill.errors import UsageError
from potstill.export.formats import ExportedFiles, ExportFormat, Predictor
from potstill.export.onnx import convert_to_onnx
from potstill.io import cache_folder, read_bytes, sha256_hex, write_bytes
from potstill.models.exported_files import ExportMetadata, create_onnx_predictor

RUNTIME = "onnxruntime-web@1.30.0"  # an npm package; MIT License
RUNTIME_FILES = {  # with the SHA-256 in that version
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_NPM_SECONDS = 600


def find_runtime(folder: Path | None = None) -> dict[str, bytes]:
    """Return onnxruntime-web's files by name: from a folder of any version, the user's cache, or npm."""
    if folder is not None:
        for place in (folder, folder / "dist"):
            if all((place / name).is_file() for name in RUNTIME_FILES):
                return {name: read_bytes(place / name) for name in RUNTIME_FILES}
        raise UsageError(f"--runtime {folder} lacks {' or '.join(RUNTIME_FILES)}: give the folder dist of {RUNTIME}")
    cache = cache_folder("runtimes", RUNTIME)
    if all((cache / name).is_file() for name in RUNTIME_FILES):
        found = {name: read_bytes(cache / name) for name in RUNTIME_FILES}
        if _is_expected(found):
            return found
    found = _download()
    for name, content in found.items():
        write_bytes(cache / name, content)
    return found


def _is_expected(found: dict[str, bytes]) -> bool:
    return all(sha256_hex(found.get(name, b"")) == digest for name, digest in RUNTIME_FILES.items())


def _download() -> dict[str, bytes]:
    other = f"Or unpack the npm package {RUNTIME} elsewhere, and name its folder dist: --runtime FOLDER"
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            f"the format page needs {RUNTIME}, which potstill gets by npm; npm is not installed here\n"
            f"Install Node.js, which has npm. {other}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(  # nosec B603 # a fixed command line
                [npm, "pack", RUNTIME, "--silent", "--pack-destination", scratch],
                cwd=scratch, capture_output=True, text=True, errors="replace", timeout=_NPM_SECONDS, check=False,
            )  # fmt: skip
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except (OSError, subprocess.SubprocessError) as error:
            reason = [str(error)]
        packed = list(Path(scratch).glob("*.tgz"))
        if not packed:
            raise UsageError(f"npm cannot get {RUNTIME}: {reason[0][:300]}\n{other}")
        found = {}
        with tarfile.open(packed[0]) as archive:
            for name in RUNTIME_FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                found[name] = member.read()
    if not _is_expected(found):
        raise UsageError(f"npm gave other files than {RUNTIME} has: their SHA-256 differ\n{other}")
    return found


def build_page(network: bytes, metadata: ExportMetadata, *, runtime: Path | None = None) -> ExportedFiles:
    """Return the page, ``.html``, with an ONNX file without preprocessing."""
    script, wasm = find_runtime(runtime).values()
    spec = metadata.input
    scale, shift = (each.ravel().tolist() for each in scale_and_shift(spec.mean, spec.std))
    facts = {
        "architecture": metadata.architecture,
        "class_names": metadata.class_names,
        "size": spec.size,
        "side": decoded_side(spec),
        "resize_mode": spec.resize_mode,
        "scale": scale,
        "shift": shift,
    }
    parts = {
        "facts": json.dumps(facts).replace("<", "\\u003c"),
        "runtime": _pack(script),
        "wasm": _pack(wasm),
        "model": _pack(network),
    }
    template = package_files("potstill.export").joinpath("static", "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    return {".html": page.encode("utf-8")}


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def open_page_files(files: ExportedFiles, *, threads: int = 0) -> Predictor:
    """Load the network that is in the page as a function that onnxruntime runs, outside of a browser."""
    packed = re.search(rb'id="model">([^<]*)<', files[".html"])
    assert packed is not None
    with gzip.open(io.BytesIO(base64.b64decode(packed[1]))) as content:
        return create_onnx_predictor(content.read(), threads=threads, patient=True)


def create_page_format(runtime: Path | None = None) -> ExportFormat:
    """Return the format of pages with the runtime of a folder, for browsers, by way of ONNX; see ``find_runtime``."""
    build = partial(build_page, runtime=runtime)
    return ExportFormat(
        lambda module, metadata: build(convert_to_onnx(module, metadata)[".onnx"], metadata),
        open_page_files,
        ".html",
        packages=("onnx", "onnxscript", "onnxruntime"),
        inside=("none",),
        from_onnx=build,
    )


PAGE = create_page_format()
