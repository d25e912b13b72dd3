"""Figures, text and JSON."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data import DataSettings
from potstill.data.entries import FINDING_KINDS, Finding
from potstill.data.splits import SplitAssignment
from potstill.data.validation import ScanTable, ValidationReport, format_report, sort_findings
from potstill.data.validation.validate import validate_data

DOCS = Path(__file__).parents[3] / "docs" / "check.md"


@pytest.fixture
def report(make_folder, picture) -> ValidationReport:
    folder = make_folder({"a": 5, "b": 4})
    picture(1, (30, 20)).save(folder / "a" / "x.jpg")
    picture(2, (50, 10)).convert("L").save(folder / "b" / "y.png")
    (folder / "b" / "z.png").write_text("no")
    return validate_data(DataSettings(source=str(folder)))


def test_figures(report: ValidationReport) -> None:
    assert report.figures["decoded"] == 11
    assert report.figures["formats"] == {"PNG": 10, "JPEG": 1}
    assert report.figures["modes"] == {"RGB": 10, "L": 1}
    assert report.figures["width"] == {"smallest": 12, "median": 12, "largest": 50}
    assert report.figures["height"] == {"smallest": 10, "median": 10, "largest": 20}
    assert report.figures["shapes"] == 3
    root = Path(report.source)
    assert report.figures["bytes"] == sum(p.stat().st_size for p in root.rglob("*.*") if p.name != "z.png")


def test_json_has_everything(report: ValidationReport) -> None:
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))

    assert (found["format"], found["images"], found["errors"], found["warnings"]) == (1, 12, 1, 0)
    assert found["kinds"] == {"no-image": 1}
    assert found["classes"] == ["a", "b"]
    assert {split: sum(counts.values()) for split, counts in found["counts"].items()} == {
        "train": 8, "val": 2, "test": 2,
    }  # fmt: skip
    (finding,) = found["findings"]
    assert set(finding) == {"severity", "kind", "path", "reason", "others"}
    assert (finding["severity"], finding["path"]) == ("error", "b/z.png")


def test_text(report: ValidationReport) -> None:
    text = list(format_report(report))

    assert text[0].startswith(f"{report.source}: 12 images, 2 classes, ")
    assert "formats  PNG 10, JPEG 1" in text
    assert "width    12 to 50 px, median 12" in text
    assert "a              4          1          1     50.0 %" in text
    assert "error: files that are not images (1): every file in a class folder counts as an image" in text
    assert text[-1] == "1 error, 0 warnings"


def test_twenty_of_a_kind_and_a_count_or_all() -> None:
    division = SplitAssignment(("a",), np.zeros(0, np.int64), np.zeros(0, np.int8), "folders")
    findings = [Finding("no-image", f"{i:03d}.png", "no") for i in range(50)]
    report = ValidationReport("x", 0, 0, division, ScanTable(0).figures(), {}, findings)
    few, every = list(format_report(report)), list(format_report(report, everything=True))

    assert sum(": no" in line and line.startswith("  ") for line in few) == 20
    assert "  and 30 more; --all shows them" in few
    assert sum(": no" in line and line.startswith("  ") for line in every) == 50


def test_errors_come_first_and_each_once() -> None:
    found = sort_findings([Finding("tiny", "a", "r"), Finding("damaged", "b", "r"), Finding("damaged", "a", "r")] * 2)

    assert [(each.kind, each.path) for each in found] == [("damaged", "a"), ("damaged", "b"), ("tiny", "a")]


def test_memory_does_not_grow_with_the_size_of_the_images() -> None:
    assert ScanTable(1000).rows.nbytes == 116 * 1000


def test_every_kind_stands_in_the_page_as_it_is() -> None:
    rows = dict(re.findall(r"^\| `([a-z][a-z-]+)` \| (.+) \|$", DOCS.read_text("utf-8"), re.MULTILINE))

    assert list(rows) == list(FINDING_KINDS)
    for kind, about in FINDING_KINDS.items():
        severity = "error, refused by `run`" if about.refused else about.severity
        assert rows[kind] == f"{severity} | {about.what} | {about.why}", kind


def test_wide_and_deep_images_count_by_their_upright_size(make_folder, picture) -> None:
    folder = make_folder({"a": 3, "b": 3})
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (30, 90)).save(folder / "a" / "turned.jpg", exif=exif)

    assert validate_data(DataSettings(source=str(folder))).figures["width"]["largest"] == 90
