"""What to try next, from measured facts alone: RULES has a line for each rule, in the order in which people read them.

A rule is a function of a run that answers None where the facts are missing or give no cause.  Its thresholds stand
above it, with a reason.
"""

from collections.abc import Callable

from potstill.report.advice import data, evidence, students, teachers
from potstill.report.advice.rule import Advice
from potstill.report.contents import Run

Rule = Callable[[Run], Advice | None]

RULES: tuple[Rule, ...] = (
    data.leakage,
    data.contradictory_labels,
    teachers.weak_teacher,
    teachers.teacher_still_improving,
    teachers.overconfident_teacher,
    students.no_room,
    students.as_good_as_teacher,
    students.overfitting,
    students.still_improving,
    students.cannot_follow,
    students.wide_gap,
    students.harmed,
    data.imbalance,
    evidence.one_seed,
    evidence.few_seeds,
    evidence.val_too_small,
    evidence.test_too_small,
)


def advice(run: Run) -> list[Advice]:
    """All that the facts of a run give cause for."""
    return [found for rule in RULES if (found := rule(run)) is not None]
