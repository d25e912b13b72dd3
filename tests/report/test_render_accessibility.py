"""The page for those who do not see it, or not well: contrast, headings, names of pictures and tables."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from potstill.report.canvas import luminance, rgb_channels

DRAWS = True  # pictures have labels too
FullPage = Callable[[int], str]  # the fixture of conftest.py
ENOUGH = 4.5  # WCAG 2.2, AA, for text of any size


class Outline(HTMLParser):
    """Headings, pictures and tables with what says of them what they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.pictures: list[dict[str, str | None]] = []
        self.tables: list[bool] = []  # whether each has a caption
        self.focus: list[tuple[str, dict[str, str | None]]] = []
        self.root: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "svg":
            self.pictures.append(found)
        elif tag == "table":
            self.tables.append(False)
        elif tag == "caption":
            self.tables[-1] = True
        elif tag == "html":
            self.root = found
        if tag == "a" or "tabindex" in found:
            self.focus.append((tag, found))


@pytest.fixture(scope="module")
def text(full_page: FullPage) -> str:
    return full_page(2)


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    return Outline(text)


def test_headings_form_an_outline(outline: Outline) -> None:
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))


def test_every_picture_says_what_it_shows_or_is_hidden(outline: Outline) -> None:
    assert len(outline.pictures) > 20
    for attributes in outline.pictures:
        if attributes.get("aria-hidden") != "true":
            assert attributes.get("role") == "img"
            assert len(attributes.get("aria-label") or "") > 8


def test_every_table_has_a_caption(outline: Outline) -> None:
    assert len(outline.tables) >= 4
    assert all(outline.tables)


def test_the_keyboard_gets_past_the_menu(outline: Outline, text: str) -> None:
    tag, first = outline.focus[0]
    assert (tag, first.get("class")) == ("a", "skip")
    target = (first.get("href") or "").removeprefix("#")
    assert f'id="{target}"' in text
    assert outline.root.get("lang") == "en"


def test_what_scrolls_can_be_scrolled_by_keyboard(text: str) -> None:
    scrolling = re.findall(r'<div class="scroll"[^>]*>', text)
    assert scrolling
    assert all('tabindex="0"' in each and "aria-label" in each for each in scrolling)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_page_and_card(text: str, theme: str) -> None:
    roots = re.findall(r":root \{([^}]*)\}", text)
    colours = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", roots[0 if theme == "light" else 1]))
    for behind in ("paper", "card"):
        below = luminance(rgb_channels(colours[behind])) + 0.05
        for name in ("ink", "faint", "accent", "good", "bad"):
            above = luminance(rgb_channels(colours[name])) + 0.05
            assert max(above, below) / min(above, below) >= ENOUGH, (theme, name, behind)
