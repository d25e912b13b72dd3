"""What several seeds say together; free of torch and scipy, so that the terminal can say it too."""

from collections.abc import Mapping
from typing import Any

from potstill.amounts import number, points

FEWEST = 3  # seeds, from which "helped" and "hurt" are said


def several(comparison: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What several seeds gave; None where there is but one."""
    seeds = (comparison or {}).get("seeds")
    if not isinstance(seeds, Mapping):
        return None
    top1 = (seeds.get("figures") or {}).get("top1")
    return seeds if isinstance(top1, Mapping) and (figure(top1, "n") or 0) > 1 else None


def over_all_seeds(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with gain, interval and gap over all seeds, where there are several; ``confidence`` is that of the
    interval, and ``p`` that of the test of seeds and images together.
    """
    seeds, found = several(comparison), dict(comparison)
    if seeds is None:
        return found
    top1, whole = seeds["figures"]["top1"], seeds.get("top1_gain") or {}
    found |= {"top1_gain": whole.get("value"), "seeds_count": top1.get("n")}
    found |= {f"top1_gain_{end}": whole.get(end) for end in ("low", "high")}
    found |= {key: whole.get(key) for key in ("p", "confidence", "looks", "seed_share")}
    keys = ("gap", "gap_low", "gap_high", "gap_closed", "gap_closed_low", "gap_closed_high")
    return found | {key: seeds.get(key) for key in keys}


def seeds_lines(comparison: Mapping[str, Any] | None) -> list[str]:
    """A line for each seed, where there are several.

    Example:
        >>> pair = {"seed": 0, "top1_gain": 0.01, "fixed": 5, "broken": 2, "mcnemar_p": 0.45}
        >>> comparison = {"seeds": {"each": [pair, pair | {"seed": 1}], "figures": {"top1": {"n": 2}}}}
        >>> print(*seeds_lines(comparison), sep=chr(10))
        seed 0: +1.0 points of top-1, distilled against baseline (5 images newly right, 2 newly wrong)
        seed 1: +1.0 points of top-1, distilled against baseline (5 images newly right, 2 newly wrong)
    """
    seeds = several(comparison)
    return [
        f"seed {each.get('seed')}: {points(gain)} points of top-1, distilled against baseline "
        f"({each.get('fixed')} images newly right, {each.get('broken')} newly wrong)"
        for each in (seeds or {}).get("each") or []
        if (gain := figure(each, "top1_gain")) is not None
    ]


def figure(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number out of a mapping, or None."""
    return number((values or {}).get(key))
