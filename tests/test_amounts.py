import math

import pytest

from potstill.amounts import NONE, count, decimal, duration, milliseconds, percent, ratio, scaled


@pytest.mark.parametrize("form", [count, decimal, duration, milliseconds, percent, ratio, scaled])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "7", True, [1]])
def test_what_is_no_number_is_a_dash(form: object, value: object) -> None:
    assert form(value) == NONE  # type: ignore[operator]


def test_forms() -> None:
    assert [percent(0.841), percent(1), percent(0.98765, 2)] == ["84.1 %", "100.0 %", "98.77 %"]
    assert [decimal(0.0123), decimal(0.000001), decimal(0)] == ["0.0123", "1.0e-06", "0.0000"]
    assert [count(1234567), ratio(12.34), ratio(0.5), ratio(1234)] == ["1,234,567", "12.3 ×", "0.50 ×", "1,234 ×"]
    assert [scaled(999), scaled(999_999), scaled(1e6), scaled(138.4e6), scaled(330_000, "B")] == [
        "999",
        "1.00 M",
        "1.00 M",
        "138 M",
        "330 kB",
    ]
    assert [milliseconds(1.234), milliseconds(45.67), milliseconds(456.7)] == ["1.23 ms", "45.7 ms", "457 ms"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.9999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (86_370, "1 d 00 h"),
        (90_000, "1 d 01 h"),
    ],
)
def test_duration_at_the_edges(seconds: float, text: str) -> None:
    assert duration(seconds) == text
