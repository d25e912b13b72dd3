"""The verb hands its options on and says what came of it; the work behind it is stood in for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from potstill.cli import main
from potstill.errors import ArtifactError
from potstill.export.options import ExportOptions
from potstill.io import write_checksummed_json


def test_options_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def export(*given, note) -> Path:
        calls.append(given)
        note("compared \x1b[31mwell")
        path = tmp_path / "a b.onnx"
        write_checksummed_json(tmp_path / "a b.onnx.json", {"files": {"a b.onnx": {"bytes": 3 * 2**20}}})
        return path

    monkeypatch.setitem(sys.modules, "potstill.export.exporter", SimpleNamespace(export=export))
    options = [
        "--model",
        "teacher",
        "--format",
        "onnx",
        "--preprocessing",
        "resize",
        "--int8",
        "--max-accuracy-drop",
        "0.5",
    ]
    assert main(["export", "runs/one", *options, "--output", "x.onnx", "--data", "here"]) == 0
    assert main(["export", "runs/one"]) == 0

    assert calls == [
        (Path("runs/one"), "teacher", ExportOptions("onnx", "resize", True, 0.5, Path("x.onnx"), "here")),
        (Path("runs/one"), None, ExportOptions()),
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == [
        f"export: {tmp_path}/a b.onnx (3.15 MB)",
        f"next:   potstill predict '{tmp_path}/a b.onnx' IMAGE",
    ]
    assert "\x1b" not in captured.err


def test_errors_have_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--format", "onxx"]) == 2
    assert "did you mean 'onnx'?" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--max-accuracy-drop", "0.05"]) == 2
    assert "is for quantized files: add --int8" in capsys.readouterr().err
    all_formats = ["export", "runs/none", "--format", "all-that-run", "--output", "x.onnx"]
    for more in ([], ["--prune", "0.5"]):  # not only after the fine-tuning
        assert main([*all_formats, *more]) == 2
        assert "--output names one file" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "torch-export"]) == ArtifactError.exit_code
    assert "has no model" in capsys.readouterr().err
    (tmp_path / "x.onnx").write_bytes(b"no model")
    assert main(["predict", str(tmp_path / "x.onnx"), str(tmp_path / "x.onnx")]) == ArtifactError.exit_code
    assert "is no ONNX model" in capsys.readouterr().err


def test_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    from potstill.export.options import FORMATS

    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in FORMATS)
