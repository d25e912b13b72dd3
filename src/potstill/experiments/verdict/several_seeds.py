"""What several seeds say together; free of torch and scipy, so that the terminal can say it too."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.amounts import number, points

# Student's t, 97.5 % quantile for 1 ... 30 degrees of freedom; more are judged as 30, which errs on the careful side.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def over_seeds(differences: Sequence[float]) -> tuple[float, float | None, float | None, float | None]:
    """Mean, standard deviation and 95 % t interval (low, high) of paired differences, one for each seed.

    The last three are None with fewer than two seeds.

    Example:
        >>> mean, deviation, low, high = over_seeds([0.01, 0.02, 0.03])  # 0.02 -+ 4.303 * 0.01 / sqrt(3)
        >>> print(f"{mean:.3f} {deviation:.3f} {low:.4f} {high:.4f}")
        0.020 0.010 -0.0048 0.0448
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, None, None, None
    deviation = statistics.stdev(differences)
    reach = T_975[min(count - 1, len(T_975)) - 1] * deviation / math.sqrt(count)
    return mean, deviation, mean - reach, mean + reach


def verdict_over_seeds(differences: Sequence[float]) -> str:
    """One sentence on the paired top-1 differences (distilled - baseline, as shares) of several seeds."""
    mean, deviation, low, high = over_seeds(differences)
    if deviation is None or low is None or high is None:
        return f"One seed only ({points(mean)} points of top-1): it cannot tell a gain from the luck of the seed."
    facts = f"over {len(differences)} seeds (standard deviation {points(deviation, signed=False)}, 95 % interval"
    facts += f" {points(low)} to {points(high)})"
    size = points(abs(mean), signed=False)
    if low > 0:
        return f"Distillation helped: {size} points of top-1 gained on average {facts}."
    if high < 0:
        return f"Distillation hurt: {size} points of top-1 lost on average {facts}."
    return f"No clear difference: {points(mean)} points of top-1 on average {facts}; the interval includes 0."


def several(comparison: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What several seeds gave; None where there is but one."""
    seeds = (comparison or {}).get("seeds")
    if not isinstance(seeds, Mapping):
        return None
    top1 = (seeds.get("figures") or {}).get("top1")
    return seeds if isinstance(top1, Mapping) and (figure(top1, "n") or 0) > 1 else None


def over_all_seeds(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with gain, interval and gap over all seeds, where there are several; the interval is that over the
    seeds, and ``images_low`` and ``images_high`` are that over the test images.
    """
    seeds, found = several(comparison), dict(comparison)
    if seeds is None:
        return found
    top1, images = seeds["figures"]["top1"], seeds.get("images") or {}
    found |= {"top1_gain": top1.get("difference"), "seeds_count": top1.get("n")}
    found |= {f"top1_gain_{end}": top1.get(f"difference_{end}") for end in ("low", "high")}
    found |= {f"images_{end}": images.get(end) for end in ("low", "high")} | {"images_p": images.get("p")}
    keys = ("gap", "gap_low", "gap_high", "gap_closed", "gap_closed_low", "gap_closed_high")
    return found | {key: seeds.get(key) for key in keys}


def seeds_lines(comparison: Mapping[str, Any] | None) -> list[str]:
    """A line for each seed, where there are several.

    Example:
        >>> pair = {"seed": 0, "top1_gain": 0.01, "fixed": 5, "broken": 2, "mcnemar_p": 0.45}
        >>> comparison = {"seeds": {"each": [pair, pair | {"seed": 1}], "figures": {"top1": {"n": 2}}}}
        >>> print(*seeds_lines(comparison), sep=chr(10))
        seed 0: +1.0 points of top-1, distilled against baseline (5 images repaired, 2 broken)
        seed 1: +1.0 points of top-1, distilled against baseline (5 images repaired, 2 broken)
    """
    seeds = several(comparison)
    return [
        f"seed {each.get('seed')}: {points(gain)} points of top-1, distilled against baseline "
        f"({each.get('fixed')} images repaired, {each.get('broken')} broken)"
        for each in (seeds or {}).get("each") or []
        if (gain := figure(each, "top1_gain")) is not None
    ]


def figure(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number out of a mapping, or None."""
    return number((values or {}).get(key))
