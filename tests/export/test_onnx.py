"""What an ONNX file says is read from its bytes; files that are made with the onnx package, or by hand."""

import contextlib

import numpy as np
import pytest

from potstill.errors import ArtifactError
from potstill.export import onnx as exporting
from potstill.input_spec import InputSpec
from potstill.models.exported_files import read_properties

onnx = pytest.importorskip("onnx", reason="needs onnx (potstill[export])")


def model(*, where: str = "initializer", external: bool = False):
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    if external:
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "/etc/passwd"
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    inner = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [value])
    if where == "initializer":
        inner.initializer.append(tensor)
        graph = inner
    elif where == "attribute":
        graph = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [value])
    else:
        inner.initializer.append(tensor)
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        graph = onnx.helper.make_graph([node], "outer", [], [value])
        if where == "subgraphs":  # a list of them, which no operator has so far
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("several", [inner]))
            graph = onnx.helper.make_graph([node], "outer", [], [value])
    made = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(made, {"one": "eins", "ü": "ö" * 300})
    return made.SerializeToString()


def test_properties_are_read() -> None:
    assert read_properties(model(), "x") == {"one": "eins", "ü": "ö" * 300}


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "subgraphs"])
def test_a_tensor_elsewhere_is_refused_wherever_it_stands(where: str) -> None:
    assert read_properties(model(where=where), "x")
    with pytest.raises(ArtifactError, match="weights in another file"):
        read_properties(model(where=where, external=True), "x")


@pytest.mark.parametrize("content", [b"\xff" * 50, b"\x0a\x05ab", b"<html>", b"\x0b\x00", b"\x80" * 9])
def test_what_is_no_model_is_one_sentence(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"^x is no ONNX model, or is damaged"):
        read_properties(content, "x")


def test_a_file_cut_anywhere_raises_nothing_else() -> None:
    content = model()
    for end in range(0, len(content), 3):
        with contextlib.suppress(ArtifactError):
            read_properties(content[:end], "x")


def test_what_nests_without_end_is_refused() -> None:
    def field(number: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(200):
        graph = field(1, field(5, field(6, graph)))  # node, attribute, graph
    with pytest.raises(ArtifactError, match="nested"):
        read_properties(field(7, graph), "x")


def test_preprocessing_is_exported_once_for_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript (potstill[export])")
    export, inputs = exporting._run_exporter, []
    monkeypatch.setattr(
        exporting, "_run_exporter", lambda module, *rest: inputs.append(module) or export(module, *rest)
    )
    one, other = (InputSpec(7, mean=(mean, 0.2, 0.3)) for mean in (0.1, 0.4))  # of no other test
    files = [exporting._export_preprocessing(spec, "normalise") for spec in (one, other, one)]
    assert len(inputs) == 2
    assert files[0] == files[2] != files[1]


def test_ncnn_computes_from_the_pixels_and_not_from_memory_that_was_freed() -> None:
    pytest.importorskip("ncnn", reason="needs ncnn (potstill[ncnn])")
    pooled = b"7767517\n2 2\nInput in0 0 1 in0\nPooling mean 1 1 in0 out0 0=1 4=1\n"  # the mean of each channel
    answer = exporting.open_ncnn_files({".ncnn.param": pooled, ".ncnn.bin": b""}, threads=1)
    for seed in range(3):  # integers, as a file with its normalisation takes them: floats are made of them
        pixels = np.random.default_rng(seed).integers(0, 256, (1, 3, 48, 48), np.uint8)
        np.testing.assert_allclose(answer(pixels), pixels.mean(axis=(2, 3)), rtol=1e-5)
