"""What distillation did, in plain and careful words; free of torch, so that the terminal can print it too.

"Helped" and "hurt" take three seeds or more, and an interval over seeds and test images together that excludes 0.  With
one seed the verdict states what was measured on that seed, and how to repeat it.
"""

from collections.abc import Mapping
from typing import Any

from potstill.amounts import points as points
from potstill.experiments.domain.sentences import domains
from potstill.experiments.verdict.sentences import (
    Finding,
    accuracies,
    cost,
    doubts,
    gap,
    limits,
    on_images,
    percent_of,
    time,
)
from potstill.experiments.verdict.several_seeds import FEWEST, figure, over_all_seeds, several


def verdict(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> str:
    """All that a run can say of distillation, as a few plain sentences.

    Args:
        comparison: ``comparison`` of results.json (gains as shares), or None where a stage is missing.
        stages: ``stages`` of results.json; with it the sentences also give the accuracies themselves.

    Example:
        >>> found = {"top1_gain": 0.018, "top1_gain_low": 0.004, "top1_gain_high": 0.032, "test_images": 270}
        >>> print(headline(found))  # doctest: +NORMALIZE_WHITESPACE
        On this seed, the distilled student's top-1 is 1.8 points above the baseline's on 270 test images (95 %
        interval over test images +0.4 to +3.2); repeat with --seeds 5 to know whether distillation helps.
    """
    return " ".join(sentences(comparison, stages))


def sentences(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> list[str]:
    """The sentences of ``verdict``: what makes the figures void comes first, then the headline."""
    found = finding(comparison)
    said = [*doubts(stages or {}, comparison or {}), headline(comparison)]
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
    """``helped`` or ``hurt`` only with ``FEWEST`` seeds or more, where the whole interval of the top-1 gain over seeds
    and test images lies on one side of 0 and the test agrees; ``one_seed`` for whatever one seed gave.
    """
    if comparison is None:
        return "unknown"
    whole = over_all_seeds(comparison)
    gain, low, high = (figure(whole, key) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    if gain is None or low is None or high is None:
        return "unknown"
    if several(comparison) is None:
        return "one_seed"
    p, confidence = figure(whole, "p"), figure(whole, "confidence")
    if p is None or confidence is None:
        return "unknown"
    if (figure(whole, "seeds_count") or 0) < FEWEST or p >= 1 - confidence:
        return "unclear"
    if low > 0:
        return "helped"
    return "hurt" if high < 0 else "unclear"


def headline(comparison: Mapping[str, Any] | None) -> str:
    """What distillation did, in one sentence."""
    found = finding(comparison)
    if comparison is None or found == "unknown":
        return (
            "Whether distillation helped cannot be said: it takes test results of both baseline and distilled student."
        )
    whole = over_all_seeds(comparison)
    gain, low, high = (float(whole[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    size, images = points(abs(gain), signed=False), on_images(whole)
    ends = f"{points(low)} to {points(high)}"
    if found == "one_seed":
        if figure(comparison, "fixed") == 0 and figure(comparison, "broken") == 0:
            what = f"the distilled student and the baseline are right on the same of {images}"
        elif gain == 0:
            what = f"distilled student and baseline have the same top-1 on {images} "
            what += f"(95 % interval over test images {ends})"
        else:
            side = "above" if gain > 0 else "below"
            what = f"the distilled student's top-1 is {size} points {side} the baseline's on {images} "
            what += f"(95 % interval over test images {ends})"
        return f"On this seed, {what}; repeat with --seeds 5 to know whether distillation helps."
    average = f"on average over {whole['seeds_count']:.0f} seeds, on {images}"
    interval = f"{percent_of(whole['confidence'])} interval over seeds and test images together {ends}"
    if found == "helped":
        return f"Distillation helped: the student gained {size} points of top-1 {average} ({interval})."
    if found == "hurt":
        return f"Distillation hurt: the student lost {size} points of top-1 {average} ({interval})."
    changed = f"the student's top-1 changed by {points(gain)} points {average} ({interval}"
    if whole["seeds_count"] < FEWEST:
        return f"Two seeds are too few for a verdict: with distillation {changed}); go on with --resume --seeds 5."
    if low <= 0 <= high:
        return f"No clear difference: with distillation {changed}, which includes 0)."
    return (
        f"No clear difference: with distillation {changed}), but so few images changed that an exact test over the "
        f"images gives p = {figure(whole, 'p') or 0:.2f}."
    )
