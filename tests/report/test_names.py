import pytest

from potstill.report.names import columns, plain, short


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
    assert plain(name) == shown
    plain(name).encode("utf-8")


def test_short_keeps_both_ends() -> None:
    assert short("abcdefghij", 10) == "abcdefghij"
    assert short("abcdefghijk", 10) == "abcde…hijk"
    assert len(short("x" * 500)) == 18


def test_columns_of_wide_and_combining_characters() -> None:
    assert (columns("abc"), columns("猫"), columns("e\u0301")) == (3, 2, 1)
