import pytest

from potstill.formatting import display_width
from potstill.report.display_names import escape_invisible, shorten


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("naïve 猫 قط", "naïve 猫 قط"),
        ("a\nb\tc\x00", r"a\x0ab\x09c\x00"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\u2066x\u2069\ufeff", r"\u2066x\u2069\ufeff"),
        ("\udcff", r"\udcff"),  # a byte of a file name that is no UTF-8
        ("\u2028", r"\u2028"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_invisible_characters_become_text(name: str, shown: str) -> None:
    assert escape_invisible(name) == shown
    escape_invisible(name).encode("utf-8")


def test_short_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk"
    assert len(shorten("x" * 500)) == 18


def test_columns_of_wide_and_combining_characters() -> None:
    assert (display_width("abc"), display_width("猫"), display_width("e\u0301")) == (3, 2, 1)
