"""Advice on the student and its training."""

from potstill.amounts import number, percent, points
from potstill.experiments.verdict.several_seeds import over_all_seeds
from potstill.experiments.verdict.verdict import finding
from potstill.report.advice.rule import Advice, figure, last_epochs, student
from potstill.report.advice.teachers import FEWEST, LATE
from potstill.report.contents import Run

OVERFIT = 0.10  # train above val in top-1: far beyond what the luck of a usual val split gives
EARLY = 0.5  # of the epochs: what came after the best one was lost on overfitting
FULL = 0.99  # top-1 of the baseline: less than one image in a hundred is left to win
FOLLOWS = 0.90  # agreement with the teacher on the very images that it was taught on
LARGER = 20.0  # times the student's parameters, from which an assistant between the two has been found to help
FAR = 0.10  # of top-1 between teacher and baseline


def no_room(run: Run) -> Advice | None:
    """The baseline is right on nearly everything."""
    top1 = figure(run, "baseline", "test", "top1")
    if top1 is None or top1 < FULL:
        return None
    return Advice(
        "The baseline leaves nothing to gain",
        f"The student on labels alone has {percent(top1)} of top-1 on test.",
        "Try a smaller student: distillation shows where the baseline falls short.",
    )


def as_good_as_teacher(run: Run) -> Advice | None:
    """The student has caught up: it may be smaller, or its teacher larger."""
    teacher, distilled = (figure(run, name, "test", "top1") for name in ("teacher", "distilled"))
    gap = number(over_all_seeds(run.comparison or {}).get("gap"))
    if teacher is None or distilled is None or gap is None or gap <= 0 or distilled < teacher:
        return None
    return Advice(
        "The student is as good as its teacher",
        f"On test the distilled student has {percent(distilled)} of top-1, the teacher {percent(teacher)}.",
        "There may be room for a smaller student; for a better one, it takes a better teacher.",
    )


def overfitting(run: Run) -> Advice | None:
    """Far better on train than on val."""
    found = student(run)
    if found is None:
        return None
    on_train, on_val = (figure(run, found.name, split, "top1") for split in ("train", "val"))
    if on_train is None or on_val is None or on_train - on_val < OVERFIT:
        return None
    epochs = last_epochs(found)
    early = epochs is not None and epochs[1] >= FEWEST and epochs[0] <= EARLY * epochs[1]
    more = f" Its best epoch was {epochs[0]} of {epochs[1]}." if early and epochs is not None else ""
    return Advice(
        "The student overfits",
        f"The {found.name} student has {percent(on_train)} of top-1 on train and {percent(on_val)} on val.{more}",
        "Show more varied views of the images, or give more images; unlabeled ones help too (data.unlabeled).",
        settings=("data.augment.crop_scale=[0.5, 1]", "data.augment.hflip=true"),
    )


def still_improving(run: Run) -> Advice | None:
    """The distilled student's best epoch was among the last ones: soft targets reward patience."""
    found = run.stages.get("distilled")
    epochs = None if found is None else last_epochs(found)
    if epochs is None or epochs[1] < FEWEST or epochs[0] < LATE * epochs[1]:
        return None
    return Advice(
        "The student was still improving",
        f"The best epoch of the distilled student on val was {epochs[0]} of {epochs[1]}.",
        "Train longer; stored answers of the teacher make further epochs cheap.",
        settings=(f"training.epochs={2 * epochs[1]}",),
    )


def cannot_follow(run: Run) -> Advice | None:
    """It says other classes than the teacher even where it was taught."""
    agreement = figure(run, "distilled", "train", "agreement")
    if agreement is None or agreement >= FOLLOWS:
        return None
    return Advice(
        "The student does not follow its teacher",
        f"It names the teacher's class on {percent(agreement)} of the training images only.",
        "Train it longer or with a higher learning rate, weigh the teacher's term more (a lower alpha with kd), or "
        "take a larger student.",
    )


def wide_gap(run: Run) -> Advice | None:
    """Distillation did not help from a teacher that is very much larger and better."""
    comparison = run.comparison or {}
    gap, larger = number(over_all_seeds(comparison).get("gap")), number(comparison.get("parameter_ratio"))
    between = any(stage.role == "assistant" for stage in run.stages.values())
    if gap is None or larger is None or between or finding(run.comparison) == "helped":
        return None
    if gap < FAR or larger < LARGER:
        return None
    return Advice(
        "The teacher is far ahead",
        f"It has {larger:.0f} times the student's parameters and leads the baseline by "
        f"{points(gap, signed=False)} points, and distillation did not clearly help.",
        "Put a network of a size between them as an assistant (`assistants` in the recipe), or take a method that "
        "is made for wide gaps, such as dist or dkd.",
        settings=("method.name=dist",),
    )


def harmed(run: Run) -> Advice | None:
    """Distillation hurt though the teacher leads."""
    gap = number(over_all_seeds(run.comparison or {}).get("gap"))
    if finding(run.comparison) != "hurt" or gap is None or gap <= 0:
        return None
    return Advice(
        "Distillation hurt although the teacher is better",
        f"The teacher leads the baseline by {points(gap, signed=False)} points of top-1 on test.",
        "Compare temperatures and weights of the label term, and train longer: soft targets take more epochs than "
        "labels.",
    )
