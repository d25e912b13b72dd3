"""Which images are picked, on answers small enough to read."""

import numpy as np

from potstill.evaluation.predictions import Predictions
from potstill.experiment.examples import ExampleGroup, select_examples

LABELS = np.array([0, 0, 1, 1, 0, 1])


def two(*first):
    """What was predicted for two classes, from the probabilities of the first."""
    return Predictions.of(np.array([[p, 1 - p] for p in first]), LABELS[: len(first)])


STUDENT = two(0.9, 0.2, 0.7, 0.1, 0.3, 0.4)  # wrong: 1 (0.8 sure), 2 (0.7), 4 (0.7)
TEACHER = two(0.8, 0.9, 0.6, 0.2, 0.1, 0.7)  # says other than the student: 1, 5
BASELINE = two(0.4, 0.6, 0.2, 0.3, 0.2, 0.9)  # wrong: 0, 4, 5


def test_the_groups_and_their_order():
    found = select_examples({"student": STUDENT, "teacher": TEACHER, "baseline": BASELINE})
    assert found == {
        "mistakes": ExampleGroup(3, (1, 2, 4)),  # 2 and 4 are equally sure: the earlier first
        "disagreements": ExampleGroup(2, (1, 5)),  # 0.8 * 0.9 against 0.6 * 0.7
        "repaired": ExampleGroup(2, (0, 5)),  # of the true class 0.4 -> 0.9, and 0.1 -> 0.6: equal, the earlier first
        "broken": ExampleGroup(2, (2, 1)),  # 0.8 -> 0.3 (less 0.5), 0.6 -> 0.2 (less 0.4)
    }


def test_no_more_than_asked_for_and_all_are_counted():
    assert select_examples({"student": STUDENT}, max_images=1) == {"mistakes": ExampleGroup(3, (1,))}


def test_a_perfect_student_has_no_mistakes():
    right = Predictions.of(np.eye(2)[LABELS], LABELS)
    assert select_examples({"student": right, "baseline": right})["mistakes"] == ExampleGroup(0, ())
