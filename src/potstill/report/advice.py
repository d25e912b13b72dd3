"""What to try next, from measured facts alone: RULES has a line for each rule, in the order in which readers see them.

A rule is a function of a run that returns None where the facts are missing or give no cause.  Its thresholds stand at
the top of its part (data, evidence, teachers, students), each with a reason.
"""

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from potstill.data.entries import FINDING_KINDS
from potstill.experiment.verdict import average_over_seeds, effect_of
from potstill.formatting import (
    format_count,
    format_decimal,
    format_duration,
    format_number,
    format_percent,
    format_points,
)
from potstill.report.run_reader import Run, StageResult


@dataclass(frozen=True)
class Advice:
    """What was measured, and what to do about it."""

    title: str  # the problem in a few words
    evidence: str  # the facts, with their numbers
    action: str  # what to try
    settings: tuple[str, ...] = ()  # as after --set, where a setting does it
    flags: tuple[str, ...] = ()  # of `potstill run`, likewise


def final_metric(run: Run, stage: str, split: str, key: str) -> float | None:
    """A final figure, or None; "teacher" is what several teachers say together."""
    if stage == "teacher" and "teachers" in run.together:
        return format_number((run.together["teachers"].get(split) or {}).get(key))
    found = run.stages.get(stage)
    return None if found is None else format_number(found.metrics.get(split, {}).get(key))


def split_size(run: Run, split: str) -> int:
    """How many images a split has; 0 where nobody knows."""
    counts = (run.data.get("counts") or {}).get(split)
    return int(sum(format_number(each) or 0 for each in counts.values())) if isinstance(counts, dict) else 0


def best_and_last_epoch(stage: StageResult) -> tuple[int, int] | None:
    """(best epoch, epochs trained); None of a network that was not trained here."""
    epochs = format_number(stage.training.get("epochs"))
    return None if stage.best_epoch is None or not epochs else (stage.best_epoch, int(epochs))


def final_student(run: Run) -> StageResult | None:
    """The distilled student, else the baseline."""
    return run.stages.get("distilled") or run.stages.get("baseline")


IMBALANCE_RATIO = 5.0  # times as many images in the largest class as in the smallest
MACRO_F1_GAP = 0.05  # below top-1: small classes are learned visibly worse


def leakage(run: Run) -> Advice | None:
    """`potstill check`, or the run itself, found training images in val or test."""
    found = _count_findings(run, "across-splits")
    if not found:
        return None
    return Advice(
        "Images leak between the splits",
        f"{format_count(found)} images lie in more than one split, so every figure on test says too much.",
        f"Take them out of one split and run again; `{_check_command(run)}` names them.",
    )


def contradictory_labels(run: Run) -> Advice | None:
    """The same picture under two labels."""
    found = _count_findings(run, "two-labels")
    if not found:
        return None
    return Advice(
        "Images under two labels",
        f"{format_count(found)} images stand under two labels; no model can be right on both.",
        f"Keep the right label of each; `{_check_command(run)}` names them.",
    )


def imbalance(run: Run) -> Advice | None:
    """Classes of very different sizes, and it shows: macro F1 lies well below top-1."""
    counts = (run.data.get("counts") or {}).get("train")
    sizes = (
        [size for each in (counts or {}).values() if (size := format_number(each))] if isinstance(counts, dict) else []
    )
    top1, f1 = (final_metric(run, "distilled", "test", key) for key in ("top1", "f1_macro"))
    if len(sizes) < 2 or top1 is None or f1 is None or _recipe_balances(run):
        return None
    if max(sizes) < IMBALANCE_RATIO * min(sizes) or top1 - f1 < MACRO_F1_GAP:
        return None
    return Advice(
        "Small classes are learned worse",
        f"The largest class has {max(sizes) / min(sizes):.0f} times as many training images as the smallest, and macro "
        f"F1 ({format_percent(f1)}) lies {format_points(top1 - f1, signed=False)} points below top-1 "
        f"({format_percent(top1)}).",
        "Weigh the classes, or draw them equally often.",
        settings=("data.class_balance=weights",),
    )


def _recipe_balances(run: Run) -> bool:
    """Whether the recipe balances already."""
    return re.search(r"^\s*class_balance:\s*[\"']?(weights|sampling)\b", run.recipe or "", re.MULTILINE) is not None


def _count_findings(run: Run, kind: str) -> int:
    """How many of a kind the run warned of."""
    pattern = rf": ([\d,]+) x {re.escape(FINDING_KINDS[kind].what)} \("
    found = (re.search(pattern, str(warning)) for warning in run.results.get("warnings") or [])
    return sum(int(match[1].replace(",", "")) for match in found if match)


def _check_command(run: Run) -> str:
    return shlex.join(["potstill", "check", str(run.data.get("source") or "DATA")])


RECOMMENDED_SEEDS = 5  # with which Student's t falls from 12.7 (two seeds) and 4.3 (three) to 2.8 standard errors
NOISY_VAL_ERROR = 0.02  # standard error of top-1 on val from which the epochs that it picks between look alike
WIDE_INTERVAL = 0.03  # half the interval of the gain


def one_seed(run: Run) -> Advice | None:
    """One pair of baseline and distilled cannot separate distillation from the seed."""
    if effect_of(run.comparison) == "unknown" or "seeds" in (run.comparison or {}):
        return None
    took = [
        format_number(run.stages[name].training.get("seconds"))
        for name in ("baseline", "distilled")
        if name in run.stages
    ]
    seconds = sum(each for each in took if each is not None)
    price = (
        f" They took {format_duration(seconds)} with this seed, so that is what each further one takes."
        if seconds
        else ""
    )
    return Advice(
        "One seed only",
        "Baseline and distilled were trained once each; another seed may reverse a difference of this size." + price,
        f"Go on with {RECOMMENDED_SEEDS} seeds; the teacher is not trained again.",
        flags=("--resume", "--seeds", str(RECOMMENDED_SEEDS)),
    )


def few_seeds(run: Run) -> Advice | None:
    """The interval over few seeds is wide for want of seeds alone."""
    seeds = format_number(average_over_seeds(run.comparison or {}).get("seeds_count"))
    if seeds is None or seeds >= RECOMMENDED_SEEDS or effect_of(run.comparison) != "unclear":
        return None
    return Advice(
        "Few seeds",
        f"With {seeds:.0f} seeds the interval is wide, and the difference is not clear.",
        f"Go on with {RECOMMENDED_SEEDS} seeds or more; what is trained stays.",
        flags=("--resume", "--seeds", str(RECOMMENDED_SEEDS)),
    )


def val_too_small(run: Run) -> Advice | None:
    """Epochs are picked by val: where its top-1 is noisy, so is the choice."""
    total = split_size(run, "val")
    top1 = final_metric(run, "distilled", "val", "top1")
    if not total or top1 is None:
        return None
    error = math.sqrt(top1 * (1 - top1) / total)
    if error < NOISY_VAL_ERROR:
        return None
    return Advice(
        "val is too small to choose by",
        f"It has {format_count(total)} images: at {format_percent(top1)} the standard error of top-1 is "
        f"{format_points(error, signed=False)} points, and epochs that differ by less look alike.",
        "Give val more images, or pick the epoch by nll, which moves less by chance.",
        settings=("training.selection_metric=nll",),
    )


def test_too_small(run: Run) -> Advice | None:
    """The interval over test images is too wide for the gain at hand."""
    whole = average_over_seeds(run.comparison or {})
    gain, total = format_number(whole.get("top1_gain")), format_number(whole.get("test_images"))
    low, high = (format_number(whole.get(f"top1_gain_{end}")) for end in ("low", "high"))
    share = format_number(whole.get("seed_share")) or 0.0
    if (
        gain is None
        or low is None
        or high is None
        or not total
        or effect_of(run.comparison) not in ("unclear", "one_seed")
    ):
        return None
    if share > 0.5:  # more seeds would narrow it further than more images
        return None
    half = (high - low) / 2
    if half < WIDE_INTERVAL or not low <= 0 <= high:
        return None
    # The interval shrinks with the root of the images: as many as it takes to shrink it to the gain itself.
    needed = total * (half / gain) ** 2 if abs(gain) > 0.001 else None
    many = f"about {_round_up(needed)} images would tell a gain of this size" if needed and needed < 1e6 else ""
    return Advice(
        "test is too small to tell",
        f"With {format_count(total)} test images the gain is known to ± {format_points(half, signed=False)} "
        "points only.",
        f"Give test more images{'; ' + many if many else ''}.",
    )


def _round_up(value: float) -> str:
    digits = max(0, int(math.log10(value)) - 1)
    return format_count(math.ceil(value / 10**digits) * 10**digits)


MEMORIZED_NLL = 0.05  # NLL on train: the label gets 95 % and more, and the other classes hardly anything to learn from
OVERCONFIDENCE_RATIO = 3.0  # as sure on train as on val: sure beyond what it knows
HIGH_TEMPERATURE = (
    8.0  # a temperature from which raising it further changes little (the logits' differences are small beside T)
)
LATE_BEST_EPOCH = 0.95  # of the epochs: a best epoch after it says that training was cut short
MIN_EPOCHS = 5  # epochs, below which the last is often the best by chance


def weak_teacher(run: Run) -> Advice | None:
    """A teacher that does not lead the baseline has little to teach."""
    whole = average_over_seeds(run.comparison or {})
    gap = format_number(whole.get("gap"))
    if gap is None or gap > 0:
        return None
    return Advice(
        "The teacher is no better than the student",
        f"On test the teacher's top-1 lies {format_points(-gap, signed=False)} points below the baseline's."
        if gap < 0
        else "On test the teacher's top-1 is that of the baseline.",
        "Train it longer, give it another learning rate, or take a larger or a pretrained one.",
        flags=("--teacher", "resnet50@pretrained"),
    )


def teacher_still_improving(run: Run) -> Advice | None:
    """Its best epoch was among the last ones."""
    teacher = run.stages.get("teacher")
    epochs = None if teacher is None else best_and_last_epoch(teacher)
    if epochs is None or epochs[1] < MIN_EPOCHS or epochs[0] < LATE_BEST_EPOCH * epochs[1]:
        return None
    if (final_metric(run, "teacher", "val", "top1") or 0.0) > 0.99:
        return None
    return Advice(
        "The teacher was still improving",
        f"Its best epoch on val was {epochs[0]} of {epochs[1]}.",
        "Train it longer: what it learns more, it can teach.",
        settings=(f"teacher.training.epochs={2 * epochs[1]}",),
    )


def overconfident_teacher(run: Run) -> Advice | None:
    """Soft targets that are nearly the labels say nothing of the other classes: raise T."""
    temperature = format_number((run.results.get("method") or {}).get("temperature"))
    on_train, on_val = (final_metric(run, "teacher", split, "nll") for split in ("train", "val"))
    if temperature is None or on_train is None or on_val is None:
        return None
    if temperature >= HIGH_TEMPERATURE or on_train > MEMORIZED_NLL or on_val < OVERCONFIDENCE_RATIO * on_train:
        return None
    ece = final_metric(run, "teacher", "val", "ece")
    calibration = "" if ece is None else f" Its calibration error on val is {format_percent(ece)}."
    return Advice(
        "The teacher is overconfident",
        f"Its NLL is {format_decimal(on_train)} on train but {format_decimal(on_val)} on val: on the images "
        "that it teaches with, "
        f"its answers at T = {temperature:g} are close to the bare labels.{calibration}",
        "Raise the temperature, so that more of the other classes' probabilities shows.",
        settings=(f"method.temperature={2 * temperature:g}",),
    )


OVERFITTING_GAP = 0.10  # train above val in top-1: far beyond what the luck of a usual val split gives
EARLY_BEST_EPOCH = 0.5  # of the epochs: what came after the best one was lost on overfitting
SATURATED_TOP1 = 0.99  # top-1 of the baseline: less than one image in a hundred is left to win
MIN_TRAIN_AGREEMENT = 0.90  # agreement with the teacher on the very images that it was taught on
WIDE_PARAMETER_RATIO = (
    20.0  # times the student's parameters, from which an assistant between the two has been found to help
)
WIDE_TOP1_GAP = 0.10  # of top-1 between teacher and baseline


def no_room(run: Run) -> Advice | None:
    """The baseline is right on nearly everything."""
    top1 = final_metric(run, "baseline", "test", "top1")
    if top1 is None or top1 < SATURATED_TOP1:
        return None
    return Advice(
        "The baseline leaves nothing to gain",
        f"The student on labels alone has {format_percent(top1)} of top-1 on test.",
        "Try a smaller student: distillation shows where the baseline falls short.",
    )


def as_good_as_teacher(run: Run) -> Advice | None:
    """The student has caught up: it may be smaller, or its teacher larger."""
    teacher, distilled = (final_metric(run, name, "test", "top1") for name in ("teacher", "distilled"))
    gap = format_number(average_over_seeds(run.comparison or {}).get("gap"))
    if teacher is None or distilled is None or gap is None or gap <= 0 or distilled < teacher:
        return None
    return Advice(
        "The student is as good as its teacher",
        f"On test the distilled student has {format_percent(distilled)} of top-1, the teacher "
        f"{format_percent(teacher)}.",
        "There may be room for a smaller student; for a better one, it takes a better teacher.",
    )


def overfitting(run: Run) -> Advice | None:
    """Far better on train than on val."""
    found = final_student(run)
    if found is None:
        return None
    on_train, on_val = (final_metric(run, found.name, split, "top1") for split in ("train", "val"))
    if on_train is None or on_val is None or on_train - on_val < OVERFITTING_GAP:
        return None
    epochs = best_and_last_epoch(found)
    early = epochs is not None and epochs[1] >= MIN_EPOCHS and epochs[0] <= EARLY_BEST_EPOCH * epochs[1]
    more = f" Its best epoch was {epochs[0]} of {epochs[1]}." if early and epochs is not None else ""
    return Advice(
        "The student overfits",
        f"The {found.name} student has {format_percent(on_train)} of top-1 on train and "
        f"{format_percent(on_val)} on val.{more}",
        "Show more varied views of the images, or give more images; unlabeled ones help too (data.unlabeled).",
        settings=("data.augment.crop_scale=[0.5, 1]", "data.augment.hflip=true"),
    )


def still_improving(run: Run) -> Advice | None:
    """The distilled student's best epoch was among the last ones: soft targets reward patience."""
    found = run.stages.get("distilled")
    epochs = None if found is None else best_and_last_epoch(found)
    if epochs is None or epochs[1] < MIN_EPOCHS or epochs[0] < LATE_BEST_EPOCH * epochs[1]:
        return None
    return Advice(
        "The student was still improving",
        f"The best epoch of the distilled student on val was {epochs[0]} of {epochs[1]}.",
        "Train longer; stored answers of the teacher make further epochs cheap.",
        settings=(f"training.epochs={2 * epochs[1]}",),
    )


def cannot_follow(run: Run) -> Advice | None:
    """It says other classes than the teacher even where it was taught."""
    agreement = final_metric(run, "distilled", "train", "agreement")
    if agreement is None or agreement >= MIN_TRAIN_AGREEMENT:
        return None
    return Advice(
        "The student does not follow its teacher",
        f"It names the teacher's class on {format_percent(agreement)} of the training images only.",
        "Train it longer or with a higher learning rate, weigh the teacher's term more (a lower alpha with kd), or "
        "take a larger student.",
    )


def wide_gap(run: Run) -> Advice | None:
    """Distillation did not help from a teacher that is very much larger and better."""
    comparison = run.comparison or {}
    gap, larger = (
        format_number(average_over_seeds(comparison).get("gap")),
        format_number(comparison.get("parameter_ratio")),
    )
    between = any(stage.role == "assistant" for stage in run.stages.values())
    if gap is None or larger is None or between or effect_of(run.comparison) == "helped":
        return None
    if gap < WIDE_TOP1_GAP or larger < WIDE_PARAMETER_RATIO:
        return None
    return Advice(
        "The teacher is far ahead",
        f"It has {larger:.0f} times the student's parameters and leads the baseline by "
        f"{format_points(gap, signed=False)} points, and distillation did not clearly help.",
        "Put a network of a size between them as an assistant (`assistants` in the recipe), or take a method that "
        "is made for wide gaps, such as dist or dkd.",
        settings=("method.name=dist",),
    )


def harmed(run: Run) -> Advice | None:
    """Distillation hurt though the teacher leads."""
    gap = format_number(average_over_seeds(run.comparison or {}).get("gap"))
    if effect_of(run.comparison) != "hurt" or gap is None or gap <= 0:
        return None
    return Advice(
        "Distillation hurt although the teacher is better",
        f"The teacher leads the baseline by {format_points(gap, signed=False)} points of top-1 on test.",
        "Compare temperatures and weights of the label term, and train longer: soft targets take more epochs than "
        "labels.",
    )


AdviceRule = Callable[[Run], Advice | None]

RULES: tuple[AdviceRule, ...] = (
    leakage,
    contradictory_labels,
    weak_teacher,
    teacher_still_improving,
    overconfident_teacher,
    no_room,
    as_good_as_teacher,
    overfitting,
    still_improving,
    cannot_follow,
    wide_gap,
    harmed,
    imbalance,
    one_seed,
    few_seeds,
    val_too_small,
    test_too_small,
)


def collect_advice(run: Run) -> list[Advice]:
    """All that the facts of a run give cause for."""
    return [found for rule in RULES if (found := rule(run)) is not None]
