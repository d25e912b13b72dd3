"""Latency of files in their engines, in a process without torch; the files are made by hand."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from potstill.errors import ArtifactError, UsageError
from potstill.export import benchmark as module
from potstill.export.benchmark import benchmark
from potstill.input_spec import InputSpec
from potstill.io import sha256_hex, write_checksummed_json
from potstill.models.exported_files import ExportMetadata

METADATA = ExportMetadata("pooled", ("red", "green", "blue"), InputSpec(8))
POOLED = "7767517\n2 2\nInput in0 0 1 in0\nPooling mean 1 1 in0 out0 0=1 4=1\n"  # the mean of each channel
KEYS = ("architecture", "class_names", "input", "inside", "int8")


def write(folder: Path, files: dict[str, bytes], main: str) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = {name: {"bytes": len(content), "sha256": sha256_hex(content)} for name, content in files.items()}
    facts = {key: value for key, value in METADATA.as_json().items() if key in KEYS}
    write_checksummed_json(folder / f"{main}.json", {"schema": 1, "files": listed, **facts})
    return folder / main


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx", reason="needs potstill[export]")
    pytest.importorskip("onnxruntime", reason="needs potstill[export]")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("ReduceMean", ["images", "axes"], ["logits"], keepdims=0)], "pooled",
        [make.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])],
        [make.make_tensor_value_info("logits", kind, ["batch", 3])],
        [make.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    make.set_model_props(model, {"potstill": METADATA.as_text()})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def ncnn_file(tmp_path: Path) -> Path:
    pytest.importorskip("ncnn", reason="needs potstill[ncnn]")
    return write(tmp_path, {"m.ncnn.param": POOLED.encode(), "m.ncnn.bin": b""}, "m.ncnn.param")


_WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx", "pnnx", "sklearn", "yaml"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
from potstill.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_measures_where_torch_is_not_installed(onnx_file: Path, ncnn_file: Path) -> None:
    options = ["--threads", "1", "--rounds", "7", "--json"]
    command = [sys.executable, "-c", _WITHOUT_TORCH, "benchmark", str(onnx_file), str(ncnn_file), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert ran.returncode == 0, ran.stderr
    first, second = json.loads(ran.stdout)
    assert (first["engine"], second["engine"]) == ("onnxruntime", "ncnn")
    assert first["bytes"] == onnx_file.stat().st_size
    for each in (first, second):
        assert (each["batch"], each["threads"], each["rounds"]) == (1, 1, 7)
        assert 0 < each["p50_ms"] <= each["p95_ms"]
        assert each["images_per_second"] == pytest.approx(1000 / each["p50_ms"])


def test_batches_and_openvino(onnx_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs potstill[openvino]")
    from potstill.export.onnx import onnx_to_openvino

    parts = onnx_to_openvino(onnx_file.read_bytes(), METADATA)
    path = write(tmp_path, {f"v{suffix}": content for suffix, content in parts.items()}, "v.xml")
    one, other = benchmark([onnx_file, path], batch=5, threads=1, rounds=3)
    assert (one.batch, other.batch, other.engine) == (5, 5, "openvino")
    assert other.bytes == sum(map(len, parts.values()))


def test_the_median_is_that_of_the_clock(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, rounds = [9.0] * 5, [10.0, 10.002, 10.0, 10.004, 10.0, 10.009]
    clock = iter([0.0, *warm_up, *rounds])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (found,) = benchmark([onnx_file], threads=1, rounds=3)
    assert (found.p50_ms, found.images_per_second) == (pytest.approx(4), pytest.approx(250))
    assert found.p95_ms == pytest.approx(4 + 0.9 * 5)


def test_what_is_wrong_is_said(ncnn_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "model.pte"
    other.write_bytes(b"")
    with pytest.raises(UsageError, match=r"model\.pte: no engine measures such files; known are \.onnx, \.xml"):
        benchmark([other])
    with pytest.raises(UsageError, match="take one image at a time, so --batch is 1, got 4"):
        benchmark([ncnn_file], batch=4)
    with pytest.raises(UsageError, match="at least 1"):
        benchmark([ncnn_file], rounds=0)
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(UsageError, match=r"needs ncnn, not installed here\nInstall: pip install ncnn"):
        benchmark([ncnn_file])
    monkeypatch.undo()
    (tmp_path / "m.ncnn.bin").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"m\.ncnn\.bin is damaged"):
        benchmark([ncnn_file])
    (tmp_path / "m.ncnn.param.json").unlink()
    with pytest.raises(ArtifactError, match=r"does not describe its input: copy m\.ncnn\.param\.json"):
        benchmark([ncnn_file])


def test_a_tflite_file_carries_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"a network")
    with pytest.raises(ArtifactError, match="does not describe its input"):
        benchmark([path])
    with zipfile.ZipFile(path, "a") as appended:
        appended.writestr("potstill.json", METADATA.as_text())
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(UsageError, match="pip install ai-edge-litert"):
        benchmark([path])
