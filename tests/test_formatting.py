import math

import pytest

from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_duration,
    format_milliseconds,
    format_percent,
    format_ratio,
    format_scaled,
)


@pytest.mark.parametrize(
    "form",
    [format_count, format_decimal, format_duration, format_milliseconds, format_percent, format_ratio, format_scaled],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "7", True, [1]])
def test_what_is_no_number_is_a_dash(form: object, value: object) -> None:
    assert form(value) == MISSING  # type: ignore[operator]


def test_forms() -> None:
    assert [format_percent(0.841), format_percent(1), format_percent(0.98765, 2)] == ["84.1 %", "100.0 %", "98.77 %"]
    assert [format_decimal(0.0123), format_decimal(0.000001), format_decimal(0)] == ["0.0123", "1.0e-06", "0.0000"]
    assert [format_count(1234567), format_ratio(12.34), format_ratio(0.5), format_ratio(1234)] == [
        "1,234,567",
        "12.3 ×",
        "0.50 ×",
        "1,234 ×",
    ]
    assert [
        format_scaled(999),
        format_scaled(999_999),
        format_scaled(1e6),
        format_scaled(138.4e6),
        format_scaled(330_000, "B"),
    ] == [
        "999",
        "1.00 M",
        "1.00 M",
        "138 M",
        "330 kB",
    ]
    assert [format_milliseconds(1.234), format_milliseconds(45.67), format_milliseconds(456.7)] == [
        "1.23 ms",
        "45.7 ms",
        "457 ms",
    ]


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
    assert format_duration(seconds) == text
