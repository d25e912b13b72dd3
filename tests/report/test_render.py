"""Whole run folders through render: files, page, hostile names."""

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from potstill.io import write_checksummed_text
from potstill.report.render import SECTIONS, mark_code, render, render_page
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py
PICTURES = ["loss_curve", "accuracy_curve", "top1_top3", *(f"confusion_matrix_{s}" for s in ("train", "val", "test"))]
TEXTS = ["metrics", *(f"classification_report_{s}" for s in ("train", "val", "test"))]
HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "\u202egpj\x1b[31m{{ 7*7 }}", "שלום"]
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", "".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, run_builder: Callable[..., Any]) -> Path:
    names = ["functional", "minor", "moderate", "defective"]
    builder = run_builder(tmp_path_factory.mktemp("runs") / "four", names, epochs=50, test_images=98)
    builder.changes = {"warnings": ["The teacher is <b>weak</b>."]}
    assert render(builder.write()) == builder.folder / "report.html"
    folder: Path = builder.folder
    return folder


def test_every_file_is_there(four: Path) -> None:
    for stage in ("teacher", "baseline", "distilled"):
        for name in PICTURES:
            with Image.open(four / stage / f"{name}.png") as image:
                assert image.width > 800
        for name in TEXTS:
            assert (four / stage / f"{name}.txt").read_text(encoding="utf-8").strip()
    assert not list(four.rglob("*.part"))


def test_page_says_what_the_files_say(four: Path) -> None:
    html = (four / "report.html").read_text(encoding="utf-8")
    found, run = Page(html), read_run(four)
    assert not found.open
    comparison = run.comparison or {}
    gained = f"{100 * comparison['top1_gain']:.1f} points above the baseline's on 392 test images"
    assert f"On this seed, the distilled student's top-1 is {gained}" in found.text
    assert "One seed cannot separate" in found.text
    assert f"{comparison['fixed']} / {comparison['broken']}" in found.text
    for stage in run.stages.values():
        assert f"{100 * stage.metrics['test']['top1']:.1f} %" in found.text
    for value in ("3.97 M", "193 M", "15.9 MB", "4.20 ms", "1,568", "kd (temperature = 2.0, alpha = 0.5)", "50 (48)"):
        assert value in found.text
    assert "The teacher is <b>weak</b>." in found.text
    assert [value for tag, key, value in found.attributes if (tag, key) == ("section", "id")] == [
        # The builder's folders are as they were before calibration and cascades were measured and images kept.
        s.name
        for s in SECTIONS
        if s.name not in ("calibration", "cascade", "flips", "images", "exports")
    ]


def test_per_class_changes_add_up(four: Path) -> None:
    run = read_run(four)
    row = r"<bdi>(\w+)</bdi></th><td>98</td><td>(\d+) .*?</td><td>(\d+) .*?</td>\s*<td>(\d+)</td><td>(\d+)</td>"
    rows = re.findall(row, (four / "report.html").read_text(encoding="utf-8"))
    comparison = run.comparison or {}
    assert [row[0] for row in rows] == run.class_names
    assert sum(int(repaired) for *_, repaired, _ in rows) == comparison["fixed"]
    assert sum(int(broken) for *_, broken in rows) == comparison["broken"]
    for _, before, after, repaired, broken in rows:
        assert int(after) - int(before) == int(repaired) - int(broken)


def test_page_is_one_file_and_accessible(four: Path) -> None:
    html = (four / "report.html").read_text(encoding="utf-8")
    found = Page(html)
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; style-src-attr 'unsafe-inline'"
    assert any(key == "content" and (value or "").startswith(policy) for _, key, value in found.attributes)
    assert not {"script", "link", "iframe", "object", "img", "form"} & set(found.tags)
    for tag, key, value in found.attributes:
        assert not key.startswith("on")
        if key in ("href", "src", "xlink:href"):
            assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, key)
    assert not re.search(r"https?://", html)
    assert not re.search(r"url\((?!#)", html)
    labels = [value for tag, key, value in found.attributes if (tag, key) == ("svg", "aria-label")]
    assert (
        len(labels) == found.tags.count("svg") == 1 + 3 * 3 + 3 * 3
    )  # one of all stages, three curves and three matrices of each
    assert all(labels)
    scopes = [value for tag, key, value in found.attributes if (tag, key) == ("th", "scope")]
    assert len(scopes) == found.tags.count("th")
    assert str(four) not in html
    ids = [value for _, key, value in found.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_rendering_twice_gives_the_same_bytes(four: Path, drawn: None) -> None:
    assert render_page(read_run(four)) == (four / "report.html").read_text(encoding="utf-8")


def test_hostile_names_come_out_as_text(build_run: BuildRun, drawn: None) -> None:
    builder = build_run(HOSTILE, epochs=1)
    builder.stages = ("baseline", "distilled")
    builder.changes = {"name": "<i>x</i>", "warnings": [HOSTILE[1]], "recipe": HOSTILE[0]}
    folder = builder.write()
    write_checksummed_text(folder / "recipe.yaml", "a: </code></pre><script>\n# \u202e {{ 1 }}\n")
    html = render_page(read_run(folder))
    found = Page(html)
    assert not found.open
    assert not {"script", "img", "i"} & set(found.tags)
    for name in (HOSTILE[0], HOSTILE[1], r"\u202egpj\x1b[31m{{ 7*7 }}", "שלום", "<i>x</i>"):
        assert name in found.text
    assert "a: </code></pre><script>\n# \\u202e {{ 1 }}" in "".join(found.pieces)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


def test_one_stage_alone(build_run: BuildRun) -> None:
    builder = build_run(3, epochs=2)
    builder.stages = ("baseline",)
    html = render(builder.write()).read_text(encoding="utf-8")
    assert "Whether distillation helped is unknown" in html
    assert 'id="classes"' not in html
    assert "Not part of this run" not in html


def test_folder_without_details(build_run: BuildRun) -> None:
    builder = build_run(2, epochs=1)
    builder.ready_teacher = True
    folder = builder.write()
    for path in [
        *folder.rglob("metrics.json*"),
        *folder.rglob("*.csv"),
        folder / "recipe.yaml",
        folder / "environment.json",
    ]:
        path.unlink()
    html = render(folder).read_text(encoding="utf-8")
    assert 'id="comparison"' in html
    assert 'id="curves"' not in html
    assert 'id="confusion"' not in html


def test_a_hundred_classes(build_run: BuildRun) -> None:
    builder = build_run([f"a class with quite a long name, number {i}" for i in range(100)], epochs=2, test_images=10)
    run = read_run(builder.write())
    html = render_page(run)
    assert "All 100 classes" in html
    assert all(html.count(f"<bdi>{name}</bdi>") >= 2 for name in run.class_names)


def test_runs_of_other_shapes_than_three_stages(build_run: BuildRun) -> None:
    builder = build_run(3, epochs=3)
    builder.stages = ("teacher", "teacher-2", "baseline", "assistant-1", "generation-1", "distilled")
    gain = {"top1_gain": 0.031, "top1_gain_low": 0.01, "top1_gain_high": 0.05}
    builder.changes = {
        "planned": [*builder.stages, "generation-2"],
        "method": {"name": "combined", "methods": [{"name": "kd"}, {"name": "crd", "factor": 0.8}]},
        "together": {"teachers": {"of": ["teacher", "teacher-2"], "test": {"top1": 0.9321}}},
        "comparison": {**gain, "test_images": 81, "others": {"assistant-1": gain}},
    }
    folder = builder.write()
    found = Page(render(folder).read_text(encoding="utf-8"))
    assert not found.open
    assert "Not part of this run: generation-2." in found.text
    assert "combined (methods = kd + 0.8 crd)" in found.text
    assert re.search(r"assistant-1 ?\d+\.\d % ?\d+\.\d % ?0\.9870 ?\+3\.1 \(\+1\.0 to \+5\.0\)", found.text)
    assert re.search(r"teachers together \(teacher, teacher-2\) ?93\.2 %", found.text)
    assert (folder / "generation-1" / "confusion_matrix_test.png").exists()


def test_a_run_without_teacher_misses_none(build_run: BuildRun) -> None:
    builder = build_run(3, epochs=2)
    builder.stages, builder.changes = ("baseline", "distilled"), {"planned": ["baseline", "distilled"]}
    assert "Not part of this run" not in render(builder.write()).read_text(encoding="utf-8")


def test_commands_within_a_sentence_are_code_and_names_stay_text() -> None:
    html = mark_code("Of `<b>` and \u202eb, `potstill models` lists 3 `more")
    assert html == "Of <code>&lt;b&gt;</code> and \\u202eb, <code>potstill models</code> lists 3 `more"
