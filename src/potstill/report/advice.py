"""Advice on what to try next, from measured facts only, by the functions in RULES in the order of the page.

A rule maps a run to advice, or None if facts are missing or give no cause.  Thresholds stand above the rules of their
part (data, evidence, teachers, students).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from potstill.code_references import find_code
from potstill.config.overrides import choose_method
from potstill.config.yaml import parse_yaml
from potstill.errors import UsageError
from potstill.experiment.verdict import average_over_seeds, effect_of, folds_of, repeats_of
from potstill.formatting import (
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_points,
)
from potstill.methods import recipe_scaling
from potstill.report.run_reader import Run, StageResult


@dataclass(frozen=True)
class Advice:
    """A problem, its evidence, and what to do about it."""

    title: str
    evidence: str  # the facts, with their numbers
    action: str
    settings: tuple[str, ...] = ()  # KEY=VALUE for --set
    flags: tuple[str, ...] = ()  # of `potstill run`


def final_metric(run: Run, stage: str, split: str, key: str) -> float | None:
    """Return a final metric, or None; "teacher" is the ensemble of several teachers."""
    if stage == "teacher" and "teachers" in run.together:
        return format_number((run.together["teachers"].get(split) or {}).get(key))
    found = run.stages.get(stage)
    return None if found is None else format_number(found.metrics.get(split, {}).get(key))


def _mean_top1(run: Run, stage: str) -> float | None:
    """Return top-1 on test as the verdict has it: of baseline and distilled, the mean over the seeds or folds."""
    top1 = ((repeats_of(run.comparison) or {}).get("figures") or {}).get("top1") or {}
    mean = format_number(top1.get({"baseline": "mean_a", "distilled": "mean_b"}.get(stage)))
    return final_metric(run, stage, "test", "top1") if mean is None else mean


def split_size(run: Run, split: str) -> int:
    """Return the number of images of a split; 0 if unknown."""
    counts = (run.data.get("counts") or {}).get(split)
    return int(sum(format_number(each) or 0 for each in counts.values())) if isinstance(counts, dict) else 0


def best_and_last_epoch(stage: StageResult) -> tuple[int, int] | None:
    """Return (best epoch, epochs trained); None for a network that was not trained here."""
    epochs = format_number(stage.training.get("epochs"))
    return None if stage.best_epoch is None or not epochs else (stage.best_epoch, int(epochs))


def recipe_setting(run: Run, *path: str) -> Any:
    """Return a setting of the run's recipe; None if the recipe or the setting is missing."""
    found = _parse_recipe(run.recipe or "")
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def code_flag(run: Run) -> list[str]:
    """Return ``["--allow-code"]`` if the run's recipe names code, without which no command takes that recipe."""
    return ["--allow-code"] if any(find_code(recipe_setting(run))) else []


@lru_cache(maxsize=1)  # several pieces of advice look at the recipe, which takes longer to parse than they take
def _parse_recipe(text: str) -> Any:
    try:
        return parse_yaml(text, "recipe.yaml").value
    except UsageError:
        return None


SEEDS_IN_FOLDS = 3
RECOMMENDED_FOLDS, FEW_TEST_IMAGES = 5, 2000  # folds test five times as many images, for five times the training
RECOMMENDED_SEEDS = 5  # Student's t is 12.7 standard errors with two seeds, 4.3 with three, 2.8 with five
SHIFT_GAP = 0.10  # of top-1 between val and test: far beyond what choosing an epoch on val adds
SHIFT_ERRORS = 4.0  # and so many standard errors of the difference
WIDE_INTERVAL = 0.03  # half width of the interval of the gain


def one_seed(run: Run) -> Advice | None:
    """Baseline and distilled were trained with one seed, whose effect is part of the gain."""
    if effect_of(run.comparison) == "unknown" or repeats_of(run.comparison) is not None:
        return None
    stages = [run.stages[name] for name in ("baseline", "distilled") if name in run.stages]
    seconds = sum(format_number(stage.training.get("seconds")) or 0.0 for stage in stages)
    cost = f" Each further seed takes {format_duration(seconds)} as this one did." if seconds else ""
    return Advice(
        "One seed only",
        "Baseline and distilled were trained once each; another seed may reverse a difference of this size." + cost,
        f"Continue with {RECOMMENDED_SEEDS} seeds; the teacher is not trained again.",
        flags=("--resume", "--seeds", str(RECOMMENDED_SEEDS)),
    )


def few_seeds(run: Run) -> Advice | None:
    """The interval is wide because of few seeds, in all or in each fold."""
    if folds_of(run.comparison):
        return _few_seeds_in_folds(run)
    seeds = format_number(average_over_seeds(run.comparison or {}).get("seeds_count"))
    if seeds is None or seeds >= RECOMMENDED_SEEDS or effect_of(run.comparison) != "unclear":
        return None
    return Advice(
        "Few seeds",
        f"With {seeds:.0f} seeds the interval is wide, and the difference is not clear.",
        f"Continue with {RECOMMENDED_SEEDS} seeds or more; finished stages are not trained again.",
        flags=("--resume", "--seeds", str(RECOMMENDED_SEEDS)),
    )


def _few_seeds_in_folds(run: Run) -> Advice | None:
    """The interval over folds is wide, and most of its variance is that of folds and seeds."""
    seeds = format_number((repeats_of(run.comparison) or {}).get("seeds")) or 1
    share = format_number(average_over_seeds(run.comparison or {}).get("seed_share")) or 0.0
    if effect_of(run.comparison) != "unclear" or seeds >= SEEDS_IN_FOLDS or share < 0.5:
        return None
    return Advice(
        "Few seeds in each fold",
        f"The difference is not clear, and {format_percent(share, 0)} of its variance is that of folds and seeds, of "
        f"which each fold has {seeds:.0f}.",
        f"Continue with {SEEDS_IN_FOLDS} seeds in each fold; the teachers are not trained again.",
        flags=("--resume", "--seeds", str(SEEDS_IN_FOLDS)),
    )


def test_is_other(run: Run) -> Advice | None:
    """All networks are far worse on test than on val, on which everything is chosen."""
    if recipe_setting(run, "data", "target") is not None:  # then other images are meant to be there
        return None
    gaps = list[tuple[float, str, float, float]]()
    for stage in ("teacher", "baseline", "distilled"):
        on_val, on_test = (final_metric(run, stage, split, "top1") for split in ("val", "test"))
        sizes = split_size(run, "val"), split_size(run, "test")
        if on_val is None or on_test is None or not all(sizes):
            continue
        error = math.sqrt(on_val * (1 - on_val) / sizes[0] + on_test * (1 - on_test) / sizes[1])
        if on_val - on_test < max(SHIFT_GAP, SHIFT_ERRORS * error):
            return None
        gaps.append((on_val - on_test, stage, on_val, on_test))
    if not gaps:
        return None
    _, stage, on_val, on_test = max(gaps)
    return Advice(
        "test has other images than val",
        f"The {'distilled student' if stage == 'distilled' else stage} has a top-1 of {format_percent(on_val)} on val "
        f"and {format_percent(on_test)} on test, more than chance explains, and so have all networks.",
        "Give a val split of images that were taken as those of test were, for all choices are made on val; and look "
        "for near copies in train and val with potstill check.",
    )


def test_too_small(run: Run) -> Advice | None:
    """The interval over test images is too wide for this gain."""
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
    # The interval shrinks with the root of the number of images; it must shrink to the size of the gain.
    needed = total * (half / gain) ** 2 if abs(gain) > 0.001 else None
    many = f"; about {_round_up(needed)} images would show a gain of this size" if needed and needed < 1e6 else ""
    evidence = (
        f"With {format_count(total)} test images the gain is known to ± {format_points(half, signed=False)} points"
    )
    if folds_of(run.comparison):
        return Advice("There are too few images to tell", f"{evidence}, though each was tested.", f"Add images{many}.")
    if total >= FEW_TEST_IMAGES:
        return Advice("test is too small to tell", f"{evidence} only.", f"Give test more images{many}.")
    return Advice(
        "test is too small to tell",
        f"{evidence} only.",
        f"Test every image once, in {RECOMMENDED_FOLDS} folds ({RECOMMENDED_FOLDS} times the training), or give test "
        f"more images{many}.",
        flags=("--folds", str(RECOMMENDED_FOLDS)),
    )


def _round_up(value: float) -> str:
    digits = max(0, int(math.log10(value)) - 1)
    return format_count(math.ceil(value / 10**digits) * 10**digits)


LATE_BEST_EPOCH = 0.9  # of the epochs; a later best epoch indicates that training was too short
MIN_EPOCHS = 5  # with fewer, the last is often the best by chance


def weak_teacher(run: Run) -> Advice | None:
    """The teacher is not better than the baseline."""
    whole = average_over_seeds(run.comparison or {})
    gap = format_number(whole.get("gap"))
    if gap is None or gap > 0:
        return None
    return Advice(
        "The teacher is no better than the student",
        f"On test the teacher's top-1 is {format_points(-gap, signed=False)} points below the baseline's."
        if gap < 0
        else "On test the teacher's top-1 equals the baseline's.",
        "Train it longer or with another learning rate, or use a larger or a pretrained one.",
        flags=_another_teacher(run),
    )


def _another_teacher(run: Run) -> tuple[str, ...]:
    model, weights = (recipe_setting(run, "teacher", key) for key in ("model", "weights"))
    known = str(model).removeprefix("timm/").partition(".")[0] == "resnet50" and weights == "pretrained"
    return () if known else ("--teacher", "resnet50@pretrained")


def teacher_still_improving(run: Run) -> Advice | None:
    """The teacher's best epoch was among the last ones."""
    teacher = run.stages.get("teacher")
    epochs = None if teacher is None else best_and_last_epoch(teacher)
    if epochs is None or epochs[1] < MIN_EPOCHS or epochs[0] < LATE_BEST_EPOCH * epochs[1]:
        return None
    if (final_metric(run, "teacher", "val", "top1") or 0.0) > 0.99:
        return None
    return Advice(
        "The teacher was still improving",
        f"Its best epoch on val was {epochs[0]} of {epochs[1]}.",
        "Train it longer: a better teacher can teach more.",
        settings=(f"teacher.training.epochs={2 * epochs[1]}",),
    )


OVERFITTING_GAP = 0.10  # of top-1 between train and val: far beyond sampling noise of a usual val split
EARLY_BEST_EPOCH = 0.5  # of the epochs
SATURATED_TOP1 = 0.99  # of the baseline
CURVE_IMAGES = 800  # with fewer, a learning curve is too noisy: at 400 it was off by 5 points on CIFAR-10
WORTHWHILE_GAIN = 0.01  # of top-1 by twice as many images


def no_room(run: Run) -> Advice | None:
    """The baseline is almost always right."""
    top1 = _mean_top1(run, "baseline")
    if top1 is None or top1 < SATURATED_TOP1:
        return None
    return Advice(
        "The baseline leaves nothing to gain",
        f"The student trained on labels alone has a top-1 of {format_percent(top1)} on test.",
        "Try a smaller student; `potstill models` lists them by size.",
        flags=("--student", "ARCH"),
    )


def as_good_as_teacher(run: Run) -> Advice | None:
    """The student has caught up with its teacher."""
    teacher, distilled = (_mean_top1(run, name) for name in ("teacher", "distilled"))
    gap = format_number(average_over_seeds(run.comparison or {}).get("gap"))
    if teacher is None or distilled is None or gap is None or gap <= 0 or distilled < teacher:
        return None
    if run.stages["distilled"].metrics.get("test", {}).get("at_chance"):  # it has not learned
        return None
    return Advice(
        "The student is as good as its teacher",
        f"On test the distilled student has a top-1 of {format_percent(distilled)}, the teacher "
        f"{format_percent(teacher)}.",
        "A smaller student may do as well; a better student needs a better teacher, such as a pretrained one.",
        flags=_another_teacher(run),
    )


def overfitting(run: Run) -> Advice | None:
    """The student is far better on train than on val."""
    found = run.stages.get("distilled") or run.stages.get("baseline")
    if found is None or found.is_probe:  # which no augmentation changes
        return None
    on_train, on_val = (final_metric(run, found.name, split, "top1") for split in ("train", "val"))
    if on_train is None or on_val is None or on_train - on_val < OVERFITTING_GAP:
        return None
    epochs = best_and_last_epoch(found)
    early = epochs is not None and epochs[1] >= MIN_EPOCHS and epochs[0] <= EARLY_BEST_EPOCH * epochs[1]
    more = f" Its best epoch was {epochs[0]} of {epochs[1]}." if early and epochs is not None else ""
    stronger = _stronger_augmentation(recipe_setting(run, "data", "augment"))
    mirrored = " Mirror images only where that does not change their class." if _MIRROR in stronger else ""
    return Advice(
        "The student overfits",
        f"The {found.name} student has a top-1 of {format_percent(on_train)} on train and "
        f"{format_percent(on_val)} on val.{more}",
        f"Use stronger augmentation, or more images.{mirrored}" if stronger else "Use more images.",
        settings=stronger,
    )


_MIRROR = "data.augment.hflip=true"


def _stronger_augmentation(augment: Any) -> tuple[str, ...]:
    """Return up to two settings that augment more than a recipe's ``data.augment`` does; none if it has them all."""
    now = augment if isinstance(augment, dict) else {}
    crop, policy = now.get("crop_scale"), now.get("auto_augment", "none")
    steps = (
        ("data.augment.crop_scale=[0.5, 1]", not isinstance(crop, list) or not crop or crop[0] > 0.5),
        (_MIRROR, not now.get("hflip")),
        ("data.augment.color_jitter=0.3", policy == "none" and not now.get("color_jitter")),
        ("data.augment.auto_augment=trivialaugment", policy == "none"),
        ("data.augment.erasing=0.25", not now.get("erasing")),
    )
    return tuple(setting for setting, missing in steps if missing)[:2]


def unlabeled_images(run: Run) -> Advice | None:
    """The distilled student overfits, and learns from labeled images only."""
    on_train, on_val = (final_metric(run, "distilled", split, "top1") for split in ("train", "val"))
    if on_train is None or on_val is None or on_train - on_val < OVERFITTING_GAP or run.data.get("unlabeled"):
        return None
    if final_metric(run, "teacher", "val", "top1") is None:
        return None  # a teacher without classes cannot answer for images without labels
    return Advice(
        "More images would help",
        f"With {format_count(split_size(run, 'train'))} training images the distilled student's top-1 on val is "
        f"{format_points(on_train - on_val, signed=False)} points below that on train.",
        "Add images, also without labels: the teacher provides their targets.",
        flags=("--unlabeled", "DIR"),
    )


def more_labels(run: Run) -> Advice | None:
    """A linear probe is expected to gain from twice as many labeled images."""
    for name in ("distilled", "baseline", "teacher"):  # rather the student's own embeddings, if it began with a probe
        head = run.stages[name].facts.get("head") if name in run.stages else None
        points = _learning_curve(head if isinstance(head, dict) else {})
        if len(points) < 3 or points[-1][0] < CURVE_IMAGES:
            continue
        gain = expected_gain(points)
        if gain < WORTHWHILE_GAIN:
            return None
        course = ", ".join(f"{format_percent(top1)} with {format_count(images)}" for images, top1 in points)
        return Advice(
            "More labeled images would help",
            f"A linear probe on the embeddings of the {name if name == 'teacher' else 'student'} has a cross-validated "
            f"top-1 of {course} training images: twice as many are expected to bring it "
            f"{format_points(gain, signed=False)} points (a power law; where this was checked, off by 1 to 2).",
            "Label more images of the same kind, those first about which the teacher is least sure: `potstill predict "
            "--output` lists them with its confidence.",
        )
    return None


def expected_gain(points: Sequence[tuple[float, float]]) -> float:
    """Return the gain of accuracy by twice as many images, by a power law through the errors, least squares of logs.

    Example:
        >>> expected_gain([(100, 0.6), (200, 0.7), (400, 0.775)])  # the error falls by a quarter with each doubling
        0.05625
    """
    errors = [max(1 - top1, 0.5 / images) for images, top1 in points]  # no point at 0, half an image instead
    slope = np.polyfit(np.log([images for images, _ in points]), np.log(errors), 1)[0]
    return round(errors[-1] * (1 - 2 ** min(float(slope), 0.0)), 6)


def _learning_curve(head: dict[str, Any]) -> list[tuple[float, float]]:
    points = head.get("learning_curve")
    found = (
        (format_number(each.get("images")), format_number(each.get("top1")))
        for each in (points if isinstance(points, list) else [])
        if isinstance(each, dict)
    )
    return sorted((images, top1) for images, top1 in found if images and top1 is not None and 0 <= top1 <= 1)


def still_improving(run: Run) -> Advice | None:
    """The distilled student's best epoch was among the last ones."""
    found = run.stages.get("distilled")
    epochs = None if found is None else best_and_last_epoch(found)
    if epochs is None or epochs[1] < MIN_EPOCHS or epochs[0] < LATE_BEST_EPOCH * epochs[1]:
        return None
    return Advice(
        "The student was still improving",
        f"The best epoch of the distilled student on val was {epochs[0]} of {epochs[1]}.",
        "Train longer; the teacher cache makes further epochs cheap.",
        settings=(f"training.epochs={2 * epochs[1]}",),
    )


def other_method(run: Run) -> Advice | None:
    """A student from scratch did not gain by kd, and the method ``auto`` would be another."""
    method = (run.results.get("method") or {}).get("name")
    teacher, student = recipe_setting(run, "teacher"), recipe_setting(run, "student")
    if method != "kd" or run.comparison is None or effect_of(run.comparison) == "helped":
        return None
    if "teacher" in run.stages and run.stages["teacher"].model.get("parameters", 0) is None:
        teacher = None  # a function, a table or a file, whose layers are hidden: methods that read logits
    chosen = {"teacher": teacher, "student": student, "method": {"name": "auto"}}
    choose_method(chosen, len(run.class_names))
    texts = {
        "srd": (
            "The student could learn the teacher's embeddings",
            "Let it learn the embeddings as well: by that a ResNet-8 from scratch gained 5 points on CIFAR-10, and on "
            "photographs of clothing a MobileNetV3 3 points and a ResNet18 2, the last not beyond doubt.",
        ),
        "dist": (
            "Another method may suit the student better",
            "Let its probabilities correlate with the teacher's, at any scale of the logits: by that a ResNet-8 gained "
            "10 points on photographs of clothing, where kd gained 3.",
        ),
    }
    if chosen["method"]["name"] not in texts:
        return None
    title, action = texts[chosen["method"]["name"]]
    evidence = "It starts from scratch, and learned from the teacher's class probabilities alone, without a clear gain."
    return Advice(title, evidence, action, flags=("--method", "auto"))


IMBALANCE_RATIO = 5.0  # images of the largest class to those of the smallest
MACRO_F1_GAP = 0.05  # below top-1


def imbalance(run: Run) -> Advice | None:
    """Class sizes differ much, and macro F1 is well below top-1."""
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
        f"F1 ({format_percent(f1)}) is {format_points(top1 - f1, signed=False)} points below top-1 "
        f"({format_percent(top1)}).",
        "Sample the classes equally often; weights (data.class_balance) reach only a loss that reads labels.",
        settings=("data.class_balance=sampling",),
    )


def _recipe_balances(run: Run) -> bool:
    return re.search(r"^\s*class_balance:\s*[\"']?(weights|sampling)\b", run.recipe or "", re.MULTILINE) is not None


def harmed(run: Run) -> Advice | None:
    """Distillation hurt although the teacher leads."""
    gap = format_number(average_over_seeds(run.comparison or {}).get("gap"))
    if effect_of(run.comparison) != "hurt" or gap is None or gap <= 0:
        return None
    method = recipe_setting(run, "method")
    settings: tuple[str, ...] = ()
    action = (
        "Try other temperatures and weights of the label term, and train longer: soft targets need more epochs than "
        "labels."
    )
    if isinstance(method, dict) and method.get("name") not in (None, "kd") and recipe_scaling(method) == "paper":
        settings = ("method.scaling=auto",)
        action = (
            "The weights that papers give to the teacher's terms belong to long trainings: bound them by the labels. "
            "Or train longer."
        )
    return Advice(
        "Distillation hurt although the teacher is better",
        f"The teacher leads the baseline by {format_points(gap, signed=False)} points of top-1 on test.",
        action,
        settings=settings,
    )


AdviceRule = Callable[[Run], Advice | None]

RULES: tuple[AdviceRule, ...] = (
    weak_teacher,
    test_is_other,
    teacher_still_improving,
    no_room,
    as_good_as_teacher,
    overfitting,
    unlabeled_images,
    more_labels,
    still_improving,
    other_method,
    harmed,
    imbalance,
    one_seed,
    few_seeds,
    test_too_small,
)


def collect_advice(run: Run) -> list[Advice]:
    """Return the advice of all rules that apply to a run."""
    if run.without_labels or (run.comparison or {}).get("fold"):
        return []  # the rules read accuracies; what a fold shows is a part of what all folds show
    return [found for rule in RULES if (found := rule(run)) is not None]
