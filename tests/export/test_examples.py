"""The examples of docs/export.md give the classes of PyTorch: compiled and run as their first lines say."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from potstill.export.predict import predict
from potstill.io import write_checksummed_json
from potstill.models.exported_files import ExportMetadata
from potstill.models.model_file import load_class_model

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NODE_MODULES = os.environ.get("POTSTILL_NODE_MODULES")  # a folder in which `npm install onnxruntime-web` has run

pytestmark = pytest.mark.slow


def export_network(run: Path, path: Path, inside: str) -> ExportMetadata:
    pytest.importorskip("onnxscript", reason="needs potstill[export]")
    from potstill.export.onnx import convert_to_onnx

    found = load_class_model(run / "distilled")
    metadata = ExportMetadata(found.architecture, tuple(found.class_names), found.input, inside)
    path.write_bytes(convert_to_onnx(found.module, metadata)[".onnx"])
    write_checksummed_json(path.with_name(f"{path.name}.json"), {"files": {}, **metadata.as_json()})
    return metadata


def check(command: list[str], run: Path, folder: Path, digits, size: tuple[int, int], name: str) -> None:
    """Run a program on pictures of digits, as PPM, and compare what it prints with PyTorch; it prints ``name`` of each
    class.
    """
    for i in range(5):
        picture, lossless = folder / "picture.ppm", folder / "picture.png"
        for path in (picture, lossless):
            Image.fromarray(digits.test.pixels(i)).resize(size).save(path)
        ran = subprocess.run([*command, str(picture)], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        printed = [line.split() for line in ran.stdout.splitlines()]
        (wanted,) = predict(run, [lossless], top=3, device="cpu")
        assert [shown for shown, _ in printed] == [name.format(each) for each, _ in wanted.classes]
        assert [float(p) for _, p in printed] == pytest.approx([p for _, p in wanted.classes], abs=1e-4)
    picture.write_bytes(b"P5 no colours")
    assert subprocess.run([*command, str(picture)], capture_output=True).returncode == 3


def test_cpp(run: Path, tmp_path: Path, digits) -> None:
    openvino = pytest.importorskip("openvino", reason="needs potstill[openvino]")
    from potstill.export.onnx import onnx_to_openvino

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    metadata = export_network(run, tmp_path / "model.onnx", "normalise")
    metadata = replace(metadata, class_names=tuple(f"[{name}]" for name in metadata.class_names))
    for suffix, content in onnx_to_openvino((tmp_path / "model.onnx").read_bytes(), metadata).items():
        (tmp_path / f"model{suffix}").write_bytes(content)
    package = Path(openvino.__file__).parent
    libraries = [str(path) for path in (package / "libs").glob("libopenvino.so.*")]
    program = tmp_path / "classify"
    subprocess.run(
        [compiler, "-std=c++17", str(EXAMPLES / "classify.cpp"), "-I", str(package / "include"), *libraries,
         f"-Wl,-rpath,{package / 'libs'}", "-o", str(program)],
        check=True,
    )  # fmt: skip
    check([str(program), str(tmp_path / "model.xml")], run, tmp_path, digits, (16, 16), "[{}]")


def test_javascript(run: Path, tmp_path: Path, digits) -> None:
    node = shutil.which("node")
    if node is None or NODE_MODULES is None:
        pytest.skip("needs node, and POTSTILL_NODE_MODULES: a folder in which `npm install onnxruntime-web` has run")
    (tmp_path / "node_modules").symlink_to(Path(NODE_MODULES, "node_modules"))
    script = shutil.copy(EXAMPLES / "classify.mjs", tmp_path)
    export_network(run, tmp_path / "model.onnx", "resize")
    check([node, str(script), str(tmp_path / "model.onnx")], run, tmp_path, digits, (43, 31), "{}")
