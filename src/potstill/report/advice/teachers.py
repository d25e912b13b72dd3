"""Advice on whom the student learns from."""

from potstill.amounts import decimal, number, percent, points
from potstill.experiments.verdict.several_seeds import over_all_seeds
from potstill.report.advice.rule import Advice, figure, last_epochs
from potstill.report.contents import Run

LEARNED_BY_HEART = (
    0.05  # NLL on train: the label gets 95 % and more, and the other classes hardly anything to learn from
)
TIMES_AS_SURE = 3.0  # as sure on train as on val: sure beyond what it knows
WARM = 8.0  # a temperature from which raising it further changes little (the logits' differences are small beside T)
LATE = 0.95  # of the epochs: a best epoch after it says that training was cut short
FEWEST = 5  # epochs, below which the last is often the best by chance


def weak_teacher(run: Run) -> Advice | None:
    """A teacher that does not lead the baseline has little to teach."""
    whole = over_all_seeds(run.comparison or {})
    gap = number(whole.get("gap"))
    if gap is None or gap > 0:
        return None
    return Advice(
        "The teacher is no better than the student",
        f"On test the teacher's top-1 lies {points(-gap, signed=False)} points below the baseline's."
        if gap < 0
        else "On test the teacher's top-1 is that of the baseline.",
        "Train it longer, give it another learning rate, or take a larger or a pretrained one.",
        flags=("--teacher", "resnet50@pretrained"),
    )


def teacher_still_improving(run: Run) -> Advice | None:
    """Its best epoch was among the last ones."""
    teacher = run.stages.get("teacher")
    epochs = None if teacher is None else last_epochs(teacher)
    if epochs is None or epochs[1] < FEWEST or epochs[0] < LATE * epochs[1]:
        return None
    if (figure(run, "teacher", "val", "top1") or 0.0) > 0.99:
        return None
    return Advice(
        "The teacher was still improving",
        f"Its best epoch on val was {epochs[0]} of {epochs[1]}.",
        "Train it longer: what it learns more, it can teach.",
        settings=(f"teacher.training.epochs={2 * epochs[1]}",),
    )


def overconfident_teacher(run: Run) -> Advice | None:
    """Soft targets that are nearly the labels say nothing of the other classes: raise T."""
    temperature = number((run.results.get("method") or {}).get("temperature"))
    on_train, on_val = (figure(run, "teacher", split, "nll") for split in ("train", "val"))
    if temperature is None or on_train is None or on_val is None:
        return None
    if temperature >= WARM or on_train > LEARNED_BY_HEART or on_val < TIMES_AS_SURE * on_train:
        return None
    ece = figure(run, "teacher", "val", "ece")
    calibration = "" if ece is None else f" Its calibration error on val is {percent(ece)}."
    return Advice(
        "The teacher is overconfident",
        f"Its NLL is {decimal(on_train)} on train but {decimal(on_val)} on val: on the images that it teaches with, "
        f"its answers at T = {temperature:g} are close to the bare labels.{calibration}",
        "Raise the temperature, so that more of the other classes' probabilities shows.",
        settings=(f"method.temperature={2 * temperature:g}",),
    )
