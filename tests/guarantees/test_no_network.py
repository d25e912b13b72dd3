"""G18: no network access of its own.  CI runs the whole suite without a network: scripts/offline."""

import os
import socket
import subprocess
import sys

import pytest

from potstill.cli import main


@pytest.fixture
def nobody_answers(monkeypatch):
    """Whoever looks up a host or connects to anything fails the test."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network in this test")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return asked


def test_no_verb_asks_for_anything(nobody_answers, tiny_recipe, tmp_path, capsys):
    root = tmp_path / "runs"
    source = next(
        line.split("source: ")[1].split(",")[0] for line in tiny_recipe.read_text().splitlines() if "source: " in line
    )
    verbs = [
        ["run", tiny_recipe, "--output-dir", root],
        ["report", root / "tiny"],
        ["check", source],
        ["predict", root / "tiny", source],
        ["evaluate", root / "tiny", "--data", source],
        ["recipes"],
        ["models", "resnet18"],
        ["methods", "kd"],
        ["cache", "ls"],
    ]
    for verb in verbs:
        assert main([str(part) for part in verb]) in (0, 3), (verb, capsys.readouterr().err)  # 3: findings of check
        assert nobody_answers == [], verb


# OpenVINO's telemetry is sent by a forked process, and leaves a client's identity in the home folder.
TO_OPENVINO = """
import io, sys
from onnx import TensorProto, helper
from potstill.export.onnx import onnx_to_openvino, open_openvino_files
from potstill.input_spec import InputSpec
from potstill.models.exported_files import ExportMetadata
sys.addaudithook(lambda event, _: event in ("os.fork", "socket.getaddrinfo", "socket.connect") and print(event))
sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("images", "logits")]
graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "g", sides[:1], sides[1:])
content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
open_openvino_files(onnx_to_openvino(content, ExportMetadata("a", ("x",), InputSpec(4))))
"""


def test_openvino_reports_nothing(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("openvino_telemetry")
    ci = ("CI", "TF_BUILD", "JENKINS_URL")  # where these are set it sends nothing anyway
    environment = {key: value for key, value in os.environ.items() if key not in ci} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TO_OPENVINO], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_page_names_no_address_that_a_browser_would_ask(finished_run):
    page = (finished_run / "report.html").read_text()
    assert not any(f'{attribute}="http' in page for attribute in ("src", "srcset", "action", "data"))
    assert "@import" not in page
    assert "url(http" not in page
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
