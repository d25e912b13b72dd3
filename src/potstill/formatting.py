"""Format numbers for people; files keep shares, bytes and seconds.  What is no number becomes a dash."""

import math
import unicodedata
from collections.abc import Callable, Container, Sequence
from typing import Any

MISSING = "–"


def format_names(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are.

    Example:
        >>> format_names(["cat", "dog"]), format_names(["a", "b", "c", "d"], most=2)
        ('cat, dog', 'a, b and 2 more')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def format_many(count: int, one: str, many: str | None = None) -> str:
    """A number with what it counts; ``many``: default ``one`` with an s.

    Example:
        >>> format_many(1, "client"), format_many(1200, "client"), format_many(0, "box", "boxes")
        ('1 client', '1,200 clients', '0 boxes')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def display_width(text: str) -> int:
    """Return the columns of ``text`` in a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def format_columns(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Return a line for each row with its cells aligned: the columns ``left`` to the left, all others to the right.

    Example:
        >>> format_columns([("layer", "size"), ("conv", "8")])
        ['layer  size', 'conv      8']
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    spaces = [[" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows]
    cells = (
        (cell + space if at in left else space + cell for at, (cell, space) in enumerate(zip(*pair, strict=True)))
        for pair in zip(rows, spaces, strict=True)
    )
    return ["  ".join(line).rstrip() for line in cells]


def format_number(value: Any) -> float | None:
    """``value`` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def format_percent(share: Any, digits: int = 1) -> str:
    """A share in [0, 1] -> ``84.1 %``."""
    value = format_number(share)
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def format_decimal(value: Any, digits: int = 4) -> str:
    """``0.0123``; tiny values in powers of ten, so that none is shown as 0."""
    amount = format_number(value)
    if amount is None:
        return MISSING
    return f"{amount:.1e}" if 0 < abs(amount) < 0.5 * 10**-digits else f"{amount:.{digits}f}"


def format_count(value: Any) -> str:
    """``1,234,567``."""
    amount = format_number(value)
    return MISSING if amount is None else f"{amount:,.0f}"


def format_scaled(value: Any, unit: str = "") -> str:
    """Three figures and a decimal prefix.

    Example:
        >>> format_scaled(134_301_514), format_scaled(20_480_000, "B"), format_scaled(970, "FLOPs")
        ('134 M', '20.5 MB', '970 FLOPs')
    """
    amount = format_number(value)
    if amount is None:
        return MISSING
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= 0.9995 * factor:
            return f"{_three_digits(amount / factor)} {prefix}{unit}"
    return f"{amount:.0f} {unit}".rstrip()


def format_milliseconds(value: Any) -> str:
    """``1.23 ms``."""
    amount = format_number(value)
    return MISSING if amount is None else f"{_three_digits(amount)} ms"


def format_ratio(value: Any) -> str:
    """``12.3 ×``."""
    amount = format_number(value)
    return (
        MISSING
        if amount is None
        else f"{amount:.2f} ×"
        if amount < 1
        else f"{amount:,.{1 if amount < 99.95 else 0}f} ×"
    )


def format_points(share: float, *, signed: bool = True) -> str:
    """A difference of shares in percentage points; a digit more where rounding would hide that it is not 0.

    Example:
        >>> format_points(0.018), format_points(-0.0004), format_points(0.0)
        ('+1.8', '-0.04', '0.0')
    """
    value = 100 * share
    digits = next((n for n in (1, 2, 3) if round(value, n)), 1)
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if round(value, digits) else f"{0:.{digits}f}"


def format_loss(share: float) -> str:
    """A loss of accuracy as a verb with percentage points; a negative one is a gain.

    Example:
        >>> format_loss(0.018), format_loss(-0.025), format_loss(0.0)
        ('loses 1.8 points', 'gains 2.5 points', 'loses 0.0 points')
    """
    return f"{'gains' if share < 0 else 'loses'} {format_points(abs(share), signed=False)} points"


def format_difference(value: float, *, signed: bool = True) -> str:
    """``+0.0123``; ``0.0000`` where it rounds to that."""
    return f"{value:{'+' if signed else ''}.4f}" if round(value, 4) else "0.0000"


def format_interval(low: float | None, high: float | None, form: Callable[[float], str], unknown: str = "") -> str:
    """``LOW to HIGH``, the unit once."""
    return unknown if low is None or high is None else f"{form(low).removesuffix(' %')} to {form(high)}"


def format_duration(seconds: Any) -> str:
    """Seconds -> ``850 ms``, ``12.3 s``, ``2 min 05 s``, ``1 h 02 min``, ``2 d 03 h``.

    Example:
        >>> [format_duration(s) for s in (0.85, 12.34, 125, 3725, 183_600)]
        ['850 ms', '12.3 s', '2 min 05 s', '1 h 02 min', '2 d 03 h']
    """
    amount = format_number(seconds)
    if amount is None:
        return MISSING
    if amount < 0.9995:
        return f"{1000 * amount:.0f} ms"
    if amount < 59.95:
        return f"{amount:.1f} s"
    whole, minutes, hours = round(amount), round(amount / 60), round(amount / 3600)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
