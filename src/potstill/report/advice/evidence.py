"""Advice on how much the figures can be trusted."""

import math

from potstill.amounts import count, duration, number, percent, points
from potstill.experiments.verdict.several_seeds import over_all_seeds
from potstill.experiments.verdict.verdict import finding
from potstill.report.advice.rule import Advice, figure, images
from potstill.report.contents import Run

SEEDS = 5  # with which Student's t falls from 12.7 (two seeds) and 4.3 (three) to 2.8 standard errors
NOISY = 0.02  # standard error of top-1 on val from which the epochs that it picks between look alike
UNSURE = 0.03  # half the interval of the gain


def one_seed(run: Run) -> Advice | None:
    """One pair of baseline and distilled cannot separate distillation from the seed."""
    if finding(run.comparison) == "unknown" or "seeds" in (run.comparison or {}):
        return None
    took = [
        number(run.stages[name].training.get("seconds")) for name in ("baseline", "distilled") if name in run.stages
    ]
    seconds = sum(each for each in took if each is not None)
    price = f" They took {duration(seconds)} with this seed, so that is what each further one takes." if seconds else ""
    return Advice(
        "One seed only",
        "Baseline and distilled were trained once each; another seed may reverse a difference of this size." + price,
        f"Go on with {SEEDS} seeds; the teacher is not trained again.",
        flags=("--resume", "--seeds", str(SEEDS)),
    )


def few_seeds(run: Run) -> Advice | None:
    """The interval over few seeds is wide for want of seeds alone."""
    seeds = number(over_all_seeds(run.comparison or {}).get("seeds_count"))
    if seeds is None or seeds >= SEEDS or finding(run.comparison) != "unclear":
        return None
    return Advice(
        "Few seeds",
        f"With {seeds:.0f} seeds the interval is wide, and the difference is not clear.",
        f"Go on with {SEEDS} seeds or more; what is trained stays.",
        flags=("--resume", "--seeds", str(SEEDS)),
    )


def val_too_small(run: Run) -> Advice | None:
    """Epochs are picked by val: where its top-1 is noisy, so is the choice."""
    total = images(run, "val")
    top1 = figure(run, "distilled", "val", "top1")
    if not total or top1 is None:
        return None
    error = math.sqrt(top1 * (1 - top1) / total)
    if error < NOISY:
        return None
    return Advice(
        "val is too small to choose by",
        f"It has {count(total)} images: at {percent(top1)} the standard error of top-1 is "
        f"{points(error, signed=False)} points, and epochs that differ by less look alike.",
        "Give val more images, or pick the epoch by nll, which moves less by chance.",
        settings=("training.selection_metric=nll",),
    )


def test_too_small(run: Run) -> Advice | None:
    """The interval over test images is too wide for the gain at hand."""
    whole = over_all_seeds(run.comparison or {})
    gain, total = number(whole.get("top1_gain")), number(whole.get("test_images"))
    low, high = (number(whole.get(f"top1_gain_{end}")) for end in ("low", "high"))
    share = number(whole.get("seed_share")) or 0.0
    if (
        gain is None
        or low is None
        or high is None
        or not total
        or finding(run.comparison) not in ("unclear", "one_seed")
    ):
        return None
    if share > 0.5:  # more seeds would narrow it further than more images
        return None
    half = (high - low) / 2
    if half < UNSURE or not low <= 0 <= high:
        return None
    # The interval shrinks with the root of the images: as many as it takes to shrink it to the gain itself.
    needed = total * (half / gain) ** 2 if abs(gain) > 0.001 else None
    many = f"about {_rounded(needed)} images would tell a gain of this size" if needed and needed < 1e6 else ""
    return Advice(
        "test is too small to tell",
        f"With {count(total)} test images the gain is known to ± {points(half, signed=False)} points only.",
        f"Give test more images{'; ' + many if many else ''}.",
    )


def _rounded(value: float) -> str:
    digits = max(0, int(math.log10(value)) - 1)
    return count(math.ceil(value / 10**digits) * 10**digits)
