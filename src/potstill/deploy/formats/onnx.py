"""ONNX, one file: for onnxruntime and most other engines."""

from typing import TYPE_CHECKING, Any

from potstill.deploy.description import KEY, Description
from potstill.deploy.formats.format import Files, Format
from potstill.deploy.formats.quiet import quiet
from potstill.deploy.onnx_session import answering
from potstill.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

INPUT, OUTPUT = "images", "logits"
_MOST = 2**31 - 1  # bytes of one protobuf message
_TEMPORARY = "prepared"


def convert(module: "nn.Module", what: Description) -> Files:
    """One ``.onnx`` with a dynamic batch and the description in its metadata.

    Raises:
        ArtifactError: the network has parts that cannot be exported, or needs more than 2 GiB.
    """
    return {".onnx": finished(network_graph(module, what), what)}


def network_graph(module: "nn.Module", what: Description) -> Any:
    """The bare network as an ``onnx.ModelProto``: float32 [B, 3, S, S] -> logits [B, K].

    Raises:
        ArtifactError: it has parts that cannot be exported.
    """
    from potstill.deploy.inside import dynamic, example

    return _exported(module, example(what.input, "none"), dynamic("none"), what.architecture, INPUT, OUTPUT)


def finished(network: Any, what: Description) -> bytes:
    """The file's bytes: with the preparation before the network, where it is wanted, and checked.

    Args:
        network: an ``onnx.ModelProto``, as ``network_graph`` gives it, or a quantized one.
        what: goes into the metadata.

    Raises:
        ArtifactError: above 2 GiB, or refused by ONNX's own checker.
    """
    import onnx

    model = network if what.inside == "none" else _with_preparation(network, what)
    _drop_traces(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: what.as_text()})
    model.producer_name, model.producer_version, model.doc_string = KEY, "", ""
    if model.ByteSize() > _MOST:
        raise ArtifactError(f"{what.architecture} needs more than the 2 GiB that one ONNX file can hold")
    content: bytes = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # the checker and its shape inference have several classes of their own
        raise ArtifactError(f"the ONNX checker refuses {what.architecture}: {_first_line(error)}") from error
    return content


def _with_preparation(network: Any, what: Description) -> Any:
    import onnx

    from potstill.deploy.inside import dynamic, example, preparation

    before = preparation(what.input, what.inside).eval()
    first = _exported(before, example(what.input, what.inside), dynamic(what.inside), "preparation", INPUT, _TEMPORARY)
    first.ir_version = network.ir_version
    for name in sorted({each.domain for each in network.opset_import} - {each.domain for each in first.opset_import}):
        version = next(each.version for each in network.opset_import if each.domain == name)
        first.opset_import.append(onnx.helper.make_opsetid(name, version))
    prefixed = onnx.compose.add_prefix(first, "prepare/", rename_inputs=False, rename_outputs=False)
    network = onnx.compose.add_prefix(network, "network/", rename_outputs=False)
    return onnx.compose.merge_models(prefixed, network, io_map=[(_TEMPORARY, f"network/{INPUT}")])


def _exported(module: "nn.Module", sample: Any, axes: dict[int, Any], name: str, taken: str, given: str) -> Any:
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


def _drop_traces(graph: Any) -> None:
    """The exporter notes for each node where in which source file it comes from: paths of this machine."""
    for each in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del each.metadata_props[:]
        each.doc_string = ""
    graph.doc_string = ""
    del graph.metadata_props[:]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def open_files(files: Files) -> Any:
    """What onnxruntime answers."""
    return answering(files[".onnx"])


FORMAT = Format(convert, open_files, ".onnx", packages=("onnx", "onnxscript", "onnxruntime"))
