"""The section on exported files."""

from collections.abc import Callable
from typing import Any

import pytest

from potstill.errors import ArtifactError
from potstill.io import write_checksummed_json
from potstill.report import render
from potstill.report.render import render_page
from potstill.report.run_reader import read_run

FACTS = {
    "schema": 1,
    "files": {"model.onnx": {"bytes": 318_000, "sha256": "0"}},
    "format": "onnx",
    "int8": False,
    "parity": {"images": 200, "max_difference": 9.5e-7, "agreement": 1.0},
    "latency_ms": {"pytorch": {"p50": 0.7, "p95": 0.9}, "onnx": {"p50": 0.19, "p95": 0.44}},
}
INT8 = {"int8": True, "accuracy": {"before": 0.9926, "after": 0.9889, "agreement": 0.985}, "latency_ms": None}


def test_a_row_for_each_file(build_run: Callable[..., Any]) -> None:
    folder = build_run(3).write()
    assert render.exports_context(read_run(folder)) is None
    assert 'id="exports"' not in render_page(read_run(folder))
    (folder / "distilled" / "export").mkdir()
    write_checksummed_json(folder / "distilled" / "export" / "model.json", FACTS)
    small = FACTS | INT8 | {"files": {"<b>.onnx": {"bytes": 90_000}}}
    write_checksummed_json(folder / "distilled" / "export" / "small.json", small)
    found = render.exports_context(read_run(folder))
    assert found is not None
    delays = "pytorch 0.70 / 0.90 ms, onnx 0.19 / 0.44 ms"
    assert found["rows"] == [
        ("distilled: model.onnx", ["onnx", "318 kB", "9.5e-07", "100.0 %", "", delays]),
        ("distilled: <b>.onnx", ["onnx, int8", "90.0 kB", "9.5e-07", "98.5 %", "99.3 % → 98.9 %", ""]),
    ]
    text = render_page(read_run(folder))
    assert 'id="exports"' in text
    assert "&lt;b&gt;.onnx" in text
    assert "Each compared with the original on test images" in text


def test_files_that_cannot_be_run_here_are_named(build_run: Callable[..., Any]) -> None:
    folder = build_run(3).write()
    (folder / "distilled" / "export").mkdir()
    apple = FACTS | {"format": "coreml", "parity": None, "latency_ms": None, "files": {"model.mlpackage": {"bytes": 1}}}
    write_checksummed_json(folder / "distilled" / "export" / "apple.json", apple)
    alone = render_page(read_run(folder))
    assert "Not compared with the original, as they run on other machines only: distilled: model.mlpackage." in alone
    assert "Each other file" not in alone
    write_checksummed_json(folder / "distilled" / "export" / "model.json", FACTS)
    assert "model.mlpackage. Each other file was, on test images before it was written. Latency" in render_page(
        read_run(folder)
    )


def test_reports_of_shrink_are_linked(build_run: Callable[..., Any]) -> None:
    folder = build_run(3).write()
    (folder / "shrink" / "distilled").mkdir(parents=True)
    found = {
        "stage": "distilled",
        "max_loss": 1.0,
        "reference": {"bytes": 324_000},
        "candidates": [{"bytes": 101_000}, {"bytes": 65_100}],
        "chosen": 1,
    }
    write_checksummed_json(folder / "shrink" / "distilled" / "shrink.json", found)
    page = render_page(read_run(folder))
    assert '<a href="shrink/distilled/shrink.html">distilled: 65.1 kB in place of 324 kB' in page
    assert "Exported files" not in page


def test_a_damaged_description_is_an_error(build_run: Callable[..., Any]) -> None:
    folder = build_run(3).write()
    (folder / "teacher" / "export").mkdir()
    path = folder / "teacher" / "export" / "model.json"
    write_checksummed_json(path, FACTS)
    path.write_text(path.read_text().replace("318000", "318001"))
    with pytest.raises(ArtifactError, match=r"model\.json"):
        render.exports_context(read_run(folder))
