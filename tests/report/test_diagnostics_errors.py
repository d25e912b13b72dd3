"""The section of images: from examples.json, which somebody may have changed, deleted or filled with nonsense."""

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from potstill.errors import ArtifactError
from potstill.report import diagnostics
from potstill.report.render import render_page, render_template
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py
FullPage = Callable[[int], str]


def shot(name: str = "test/a/1.png", **changes: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (90, 20, 30)).save(file, "PNG")
    picture = {"type": "png", "width": 8, "height": 6, "data": base64.b64encode(file.getvalue()).decode()}
    said = {"class": "b", "probability": 0.8125}
    return {
        "name": name,
        "class": "a",
        "predictions": {"teacher": {"class": "a", "probability": 0.5}, "baseline": said, "distilled": said},
        "thumbnail": picture,
    } | changes


def kept(shots: dict[str, Any], **groups: Any) -> dict[str, Any]:
    return {
        "split": "test",
        "parts": {"student": "distilled", "teacher": "teacher", "baseline": "baseline"},
        "groups": groups or {"mistakes": {"count": 17, "images": list(shots)}},
        "images": shots,
    }


@pytest.fixture
def run(build_run: BuildRun) -> Callable[[dict[str, Any] | None], Any]:
    def make(examples: dict[str, Any] | None) -> Any:
        builder = build_run(["a", "b"], epochs=1, test_images=5)
        builder.examples = examples
        return read_run(builder.write())

    return make


def test_a_card_says_what_everybody_said(run: Any) -> None:
    found = diagnostics.images_context(run(kept({"3": shot()})))
    (group,) = found["groups"]
    assert (group["title"], group["all"]) == ("The most confident mistakes of distilled", False)
    assert group["counted"] == "17 wrong predictions, the most confident first"
    (card,) = group["cards"]
    assert card["answers"] == [
        ("teacher", "a", "50.0 %", "right"),
        ("baseline", "b", "81.2 %", "wrong"),
        ("distilled", "b", "81.2 %", "wrong"),
    ]
    assert list(found["pictures"]) == ["3"]
    assert found["pictures"]["3"]["small"]  # enlarged without blur


def test_a_picture_in_two_groups_is_in_the_page_once(run: Any) -> None:
    groups = {name: {"count": 1, "images": ["3"]} for name in ("mistakes", "broken")}
    text = render_page(run(kept({"3": shot()}, **groups)))
    assert text.count(shot()["thumbnail"]["data"]) == 1
    assert text.count('<use href="#shot-3"/>') == 2  # in each group


def test_without_the_file_there_is_no_section(run: Any) -> None:
    alone = run(None)
    assert diagnostics.images_context(alone) is None
    assert 'id="images"' not in render_page(alone)


def test_photographs_that_must_not_be_passed_on_can_be_deleted(build_run: BuildRun) -> None:
    builder = build_run(["a", "b"], epochs=1, test_images=5)
    builder.examples = kept({"3": shot()})
    folder = builder.write()
    assert 'id="images"' in render_page(read_run(folder))
    (folder / "examples.json").unlink()
    assert 'id="images"' not in render_page(read_run(folder))


def test_a_changed_file_is_refused(build_run: BuildRun) -> None:
    builder = build_run(["a", "b"], epochs=1, test_images=5)
    builder.examples = kept({"3": shot()})
    folder = builder.write()
    path = folder / "examples.json"
    path.write_bytes(path.read_bytes().replace(b"0.8125", b"0.9125"))
    with pytest.raises(ArtifactError, match=r"examples\.json"):
        read_run(folder)


@pytest.mark.parametrize(
    "thumbnail",
    [
        None,
        {"type": "svg+xml", "width": 8, "height": 8, "data": "PHN2Zy8+"},
        {"type": "png", "width": 8, "height": 8, "data": '"><script>'},
        {"type": "png", "width": 0, "height": 8, "data": "AAAA"},
        {"type": "png", "width": 8, "height": 8, "data": ""},
    ],
)
def test_what_is_no_picture_is_left_out_and_counted(run: Any, thumbnail: Any) -> None:
    found = diagnostics.images_context(run(kept({"3": shot(thumbnail=thumbnail)})))
    assert found["pictures"] == {}
    assert found["notes"] == ["One image has no picture: the file could no longer be read when the run ended."]


def test_names_come_out_as_text(run: Any) -> None:
    nasty = '"><script>alert(1)</script>'
    text = render_page(run(kept({"3": shot(nasty, **{"class": nasty})})))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_nothing_broken_is_said_too(run: Any) -> None:
    text = render_page(run(kept({}, broken={"count": 0, "images": []})))
    assert re.search(r"Newly wrong with distillation</h3>\s*<p class=\"note\">None on test.", text)


def test_with_everything_that_can_be_shown_a_page_stays_light(full_page: FullPage, drawn: None) -> None:
    text = full_page(100)
    assert 'id="images"' in text
    assert len(text.encode()) < 3_000_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1 wrong prediction."), (2, "2 wrong predictions, the most confident first; 1 of them is shown.")],
)
def test_one_image_is_counted_in_the_singular(run: Any, count: int, text: str) -> None:
    examples = kept({"3": shot()})
    examples["groups"] = {"mistakes": {"count": count, "images": ["3"]}}
    found = diagnostics.images_context(run(examples))
    page = render_template("sections/images.html.j2", {"values": found})
    assert text in " ".join(page.split())
