"""Numbers as people read them; files keep shares, bytes and seconds.  Whatever is no number becomes a dash."""

import math
from typing import Any

NONE = "–"


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def percent(share: Any, digits: int = 1) -> str:
    """A share in [0, 1] -> ``84.1 %``."""
    value = number(share)
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def decimal(value: Any, digits: int = 4) -> str:
    """``0.0123``; tiny values in powers of ten, so that none is shown as 0."""
    amount = number(value)
    if amount is None:
        return NONE
    return f"{amount:.1e}" if 0 < abs(amount) < 0.5 * 10**-digits else f"{amount:.{digits}f}"


def count(value: Any) -> str:
    """``1,234,567``."""
    amount = number(value)
    return NONE if amount is None else f"{amount:,.0f}"


def scaled(value: Any, unit: str = "") -> str:
    """Three figures and a decimal prefix.

    Example:
        >>> scaled(134_301_514), scaled(20_480_000, "B"), scaled(970, "FLOPs")
        ('134 M', '20.5 MB', '970 FLOPs')
    """
    amount = number(value)
    if amount is None:
        return NONE
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= 0.9995 * factor:
            return f"{_three(amount / factor)} {prefix}{unit}"
    return f"{amount:.0f} {unit}".rstrip()


def milliseconds(value: Any) -> str:
    """``1.23 ms``."""
    amount = number(value)
    return NONE if amount is None else f"{_three(amount)} ms"


def ratio(value: Any) -> str:
    """``12.3 ×``."""
    amount = number(value)
    return (
        NONE if amount is None else f"{amount:.2f} ×" if amount < 1 else f"{amount:,.{1 if amount < 99.95 else 0}f} ×"
    )


def points(share: float, *, signed: bool = True) -> str:
    """A difference of shares in percentage points; a digit more where rounding would hide that it is not 0.

    Example:
        >>> points(0.018), points(-0.0004), points(0.0)
        ('+1.8', '-0.04', '0.0')
    """
    value = 100 * share
    digits = next((n for n in (1, 2, 3) if round(value, n)), 1)
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if round(value, digits) else f"{0:.{digits}f}"


def duration(seconds: Any) -> str:
    """Seconds -> ``850 ms``, ``12.3 s``, ``2 min 05 s``, ``1 h 02 min``, ``2 d 03 h``.

    Example:
        >>> [duration(s) for s in (0.85, 12.34, 125, 3725, 183_600)]
        ['850 ms', '12.3 s', '2 min 05 s', '1 h 02 min', '2 d 03 h']
    """
    amount = number(seconds)
    if amount is None:
        return NONE
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


def _three(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
