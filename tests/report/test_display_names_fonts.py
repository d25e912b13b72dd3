"""Class names in pictures: readable where a font has their letters, else numbers with a legend and one warning."""

import warnings

import pytest

from potstill.report import display_names
from potstill.report.canvas import as_png
from potstill.report.display_names import picture_labels

DRAWS = True
NAMES = ("猫", "قطة", "बिल्ली", "dog", "naïve")


@pytest.fixture
def installed(monkeypatch):
    """Sets which fonts there are: family -> letters."""

    def put(**families):
        found = tuple((name, frozenset(letters)) for name, letters in families.items())
        monkeypatch.setattr(display_names, "_installed_fonts", lambda: found)
        display_names._picture_labels.cache_clear()

    yield put
    display_names._picture_labels.cache_clear()


def test_names_without_a_font_become_numbers_with_a_legend_and_a_warning(installed):
    installed()
    found = picture_labels(NAMES)
    assert found.names == ("#1", "قطة", "#3", "dog", "naïve")  # matplotlib's own font has Arabic
    assert found.unreadable == ("猫", "बिल्ली")
    assert "#n" in found.legend
    assert all(part in found.warning for part in ("2 class names", "猫", "model.json", "Install a font"))


def test_fonts_that_have_the_letters_are_used_and_no_more_than_needed(installed):
    installed(Unneeded="xyz", Han="猫犬", Half="बल", Devanagari="बिल्ली", Other="猫")
    found = picture_labels(NAMES)
    assert found == (NAMES, ("Han", "Half", "Devanagari"), ())
    assert found.legend == found.warning == ""


def test_a_name_of_which_one_letter_is_missing_is_a_number(installed):
    installed(Half="बल")
    assert picture_labels(["बल", "बिल"]).names == ("बल", "#2")


def test_plain_names_look_for_no_font(monkeypatch):
    monkeypatch.setattr(display_names, "_installed_fonts", lambda: pytest.fail("fonts were looked for"))
    assert picture_labels(["cat", "Größe"]) == (("cat", "Größe"), (), ())


def test_letters_of_an_installed_font_are_drawn(capfd):
    """The picture with its own letters is another one than with the boxes that stand for missing letters."""
    display_names._picture_labels.cache_clear()
    found = picture_labels(["猫"])
    if found.unreadable:
        pytest.skip("no font with Chinese letters is installed")

    def draw(figure):
        figure.subplots().set_title("猫")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = as_png(draw, (2, 2), families=found.families)
    assert drawn != as_png(draw, (2, 2))
    assert capfd.readouterr().err == ""
