"""What distillation did, in plain and careful words; free of torch, so that the terminal can say it too.

With several seeds there are two kinds of luck: that of the seed (Student's t over the paired differences) and that of
the test images (bootstrap of the mean difference, and an exact test).  A gain is called one where both exclude it.
"""

from collections.abc import Mapping
from typing import Any

from potstill.amounts import points as points
from potstill.experiments.domain.sentences import domains
from potstill.experiments.verdict.sentences import Finding, accuracies, cost, gap, limits, on_images, time
from potstill.experiments.verdict.several_seeds import figure, over_all_seeds, several


def verdict(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> str:
    """All that a run can say of distillation, as a few plain sentences.

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
    whole = over_all_seeds(comparison)
    said += [
        accuracies(stages or {}, comparison),
        domains(comparison),
        gap(whole, found),
        cost(comparison),
        time(stages or {}),
    ]
    said.append(limits(comparison))
    return [sentence for sentence in said if sentence]


def finding(comparison: Mapping[str, Any] | None) -> Finding:
    """``helped`` or ``hurt`` only where the whole 95 % interval of the top-1 gain lies on one side of 0.

    McNemar's exact test must agree where it is given: with few images repaired and broken, the percentile interval is
    too narrow (7 repaired and 1 broken exclude 0, yet so uneven a split happens to a fair coin 7 times in 100).  With
    several seeds, the interval over seeds, that over images and the exact test over images must all agree.
    """
    if comparison is None:
        return "unknown"
    whole = over_all_seeds(comparison)
    gain, low, high = (figure(whole, key) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    if gain is None or low is None or high is None:
        return "unknown"
    if several(comparison) is not None:
        low_too, high_too, p = (figure(whole, f"images_{key}") for key in ("low", "high", "p"))
        if low_too is None or high_too is None:
            return "unknown"
        low, high = min(low, low_too), max(high, high_too)
        disagrees = p is not None and p >= 0.05
    else:
        disagrees = _disagrees(comparison)
    if disagrees:
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
    if several(comparison) is not None:
        return _headline_of_seeds(over_all_seeds(comparison), found)
    gain, low, high = (float(comparison[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    size, images = points(abs(gain), signed=False), on_images(comparison)
    interval = f"95 % interval {points(low)} to {points(high)}"
    if found == "helped":
        return f"Distillation helped: the student gained {size} points of top-1 on {images} ({interval})."
    if found == "hurt":
        return f"Distillation hurt: the student lost {size} points of top-1 on {images} ({interval})."
    if figure(comparison, "fixed") == 0 and figure(comparison, "broken") == 0:
        return f"No difference: the student was right on the same of {images} with distillation as without."
    changed = f"No clear difference: with distillation the student's top-1 changed by {points(gain)} points on {images}"
    if low > 0 or high < 0:
        p = figure(comparison, "mcnemar_p")
        return f"{changed} ({interval}), but McNemar's exact test gives p = {p:.2f}: too few images changed to be sure."
    return f"{changed}, and the {interval} includes 0."


def _headline_of_seeds(whole: Mapping[str, Any], found: Finding) -> str:
    gain, low, high = (float(whole[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    images_low, images_high = (float(whole[f"images_{end}"]) for end in ("low", "high"))
    size, average = points(abs(gain), signed=False), f"on average over {whole['seeds_count']:.0f} seeds"
    by_seed, by_image = (f"{points(a)} to {points(b)}" for a, b in ((low, high), (images_low, images_high)))
    both = f"95 % interval {by_seed} over seeds, {by_image} over the {on_images(whole).removeprefix('the ')}"
    if found == "helped":
        return f"Distillation helped: the student gained {size} points of top-1 {average} ({both})."
    if found == "hurt":
        return f"Distillation hurt: the student lost {size} points of top-1 {average} ({both})."
    changed = f"No clear difference: with distillation the student's top-1 changed by {points(gain)} points {average}"
    seeds_include, images_include = low <= 0 <= high, images_low <= 0 <= images_high
    if seeds_include and images_include:
        return f"{changed} ({both}), and both intervals include 0."
    if seeds_include:
        return f"{changed} ({both}); other seeds may well turn it round."
    if images_include:
        return f"{changed} ({both}); other test images may well turn it round."
    return (
        f"{changed} ({both}), but the exact test over images gives p = {figure(whole, 'images_p') or 0:.2f}: too few "
        "images changed to be sure."
    )


def _disagrees(comparison: Mapping[str, Any] | None) -> bool:
    p = figure(comparison, "mcnemar_p")
    return p is not None and p >= 0.05
