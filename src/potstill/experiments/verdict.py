"""What distillation did, in plain and careful words; free of torch, so that the terminal can say it too."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from potstill.experiments.stage_names import in_order

Finding = Literal["helped", "hurt", "unclear", "unknown"]

# Student's t, 97.5 % quantile for 1 ... 30 degrees of freedom; more are judged as 30, which errs on the careful side.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def verdict(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> str:
    """All that one run can say of distillation, as a few plain sentences.

    Args:
        comparison: ``comparison`` of results.json (gains as shares), or None where a stage is missing.
        stages: ``stages`` of results.json; with it the sentences also give the accuracies themselves.

    Example:
        >>> print(headline({"top1_gain": 0.018, "top1_gain_low": 0.004, "top1_gain_high": 0.032, "test_images": 270}))
        Distillation helped: the student gained 1.8 points of top-1 on 270 test images (95 % interval +0.4 to +3.2).
    """
    return " ".join(sentences(comparison, stages))


def sentences(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> list[str]:
    """The sentences of ``verdict``, the headline first."""
    found = finding(comparison)
    said = [headline(comparison)]
    if comparison is None or found == "unknown":
        return said
    said += [_accuracies(stages or {}), _gap(comparison, found), _cost(comparison)]
    said.append(
        "One seed cannot tell such a gain or loss from the luck of the seed: "
        "the interval covers the choice of test images only, so repeat with other seeds before deciding."
    )
    return [sentence for sentence in said if sentence]


def finding(comparison: Mapping[str, Any] | None) -> Finding:
    """``helped`` or ``hurt`` only where the whole 95 % interval of the top-1 gain lies on one side of 0.

    McNemar's exact test must agree where it is given: with few images repaired and broken, the percentile interval is
    too narrow (7 repaired and 1 broken exclude 0, yet so uneven a split happens to a fair coin 7 times in 100).
    """
    gain, low, high = (_number(comparison, key) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    if gain is None or low is None or high is None:
        return "unknown"
    if _disagrees(comparison):
        return "unclear"
    if low > 0 and gain > 0:
        return "helped"
    if high < 0 and gain < 0:
        return "hurt"
    return "unclear"


def headline(comparison: Mapping[str, Any] | None) -> str:
    """The verdict's first sentence."""
    found = finding(comparison)
    if comparison is None or found == "unknown":
        return (
            "Whether distillation helped cannot be said: it takes test results of both baseline and distilled student."
        )
    gain, low, high = (float(comparison[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    size, images = points(abs(gain), signed=False), _images(comparison)
    interval = f"95 % interval {points(low)} to {points(high)}"
    if found == "helped":
        return f"Distillation helped: the student gained {size} points of top-1 on {images} ({interval})."
    if found == "hurt":
        return f"Distillation hurt: the student lost {size} points of top-1 on {images} ({interval})."
    if _number(comparison, "fixed") == 0 and _number(comparison, "broken") == 0:
        return f"No difference: the student was right on the same of {images} with distillation as without."
    changed = f"No clear difference: with distillation the student's top-1 changed by {points(gain)} points on {images}"
    if low > 0 or high < 0:
        p = _number(comparison, "mcnemar_p")
        return f"{changed} ({interval}), but McNemar's exact test gives p = {p:.2f}: too few images changed to be sure."
    return f"{changed}, and the {interval} includes 0."


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


def _accuracies(stages: Mapping[str, Any]) -> str:
    said = []
    for name in in_order(stages):
        top1 = _number((stages.get(name) or {}).get("test"), "top1")
        if top1 is not None:
            said.append(f"{name} {100 * top1:.1f} %")
    return f"Top-1 on test: {', '.join(said)}." if len(said) > 1 else ""


def _disagrees(comparison: Mapping[str, Any] | None) -> bool:
    p = _number(comparison, "mcnemar_p")
    return p is not None and p >= 0.05


def _gap(comparison: Mapping[str, Any], found: Finding) -> str:
    gap, closed = _number(comparison, "gap"), _number(comparison, "gap_closed")
    if gap is None:
        return ""
    several = (_number(comparison, "teachers") or 1) > 1
    if gap <= 0:
        how = "no better than" if gap == 0 else f"{points(-gap, signed=False)} points worse than"
        who = "The teachers together are" if several else "The teacher is"
        return f"{who} {how} the baseline, so there was no gap to close: a better teacher comes first."
    who = "The teachers together lead" if several else "The teacher leads"
    lead = f"{who} the baseline by {points(gap, signed=False)} points"
    if found == "unclear":
        return f"{lead}; this test split cannot tell how much of that gap distillation closed."
    if found == "hurt":
        return f"{lead}; distillation did not close this gap but widened it."
    if closed is None or closed <= 0:
        return f"{lead}."
    if closed >= 1:
        return f"{lead}; the distilled student closed all of this gap."
    return f"{lead}; the distilled student closed {100 * closed:.0f} % of this gap."


def _cost(comparison: Mapping[str, Any]) -> str:
    """Ratios are teacher to student: 12.3 means that the teacher has 12.3 times as many."""
    small, fast = _number(comparison, "parameter_ratio"), _number(comparison, "latency_ratio")
    size, speed = _ratio(small, "smaller", "larger"), _ratio(fast, "faster", "slower")
    said = [text for text in (size and f"{size} in parameters", speed and f"{speed} for one image") if text]
    several = (_number(comparison, "teachers") or 1) > 1
    return f"Against the teacher{'s together' if several else ''}, the student is {' and '.join(said)}." if said else ""


def _ratio(ratio: float | None, more: str, less: str) -> str:
    if ratio is None or ratio <= 0:
        return ""
    if 0.95 < ratio < 1.05:
        return f"neither {more} nor {less}"
    word, factor = (more, ratio) if ratio > 1 else (less, 1 / ratio)
    return f"{factor:.1f} times {word}" if factor < 100 else f"{factor:,.0f} times {word}"


def _images(comparison: Mapping[str, Any]) -> str:
    count = _number(comparison, "test_images")
    if count is None:
        return "the test images"
    return "1 test image" if count == 1 else f"{count:,.0f} test images"


def _number(values: Mapping[str, Any] | None, key: str) -> float | None:
    value = (values or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
