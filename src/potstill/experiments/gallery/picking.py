"""Which images of a split are worth a look, from what the networks said of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from potstill.evaluation.averages import Array
from potstill.evaluation.predictions import Predictions

MOST = 6  # images of a group


@dataclass(frozen=True)
class Pick:
    """A group of images: how many there are of the kind, and the positions of the first."""

    count: int
    images: tuple[int, ...]


def pick(answers: Mapping[str, Predictions], most: int = MOST) -> dict[str, Pick]:
    """Images by group, the clearest first; of two equally clear ones the earlier in the split.

    ``mistakes``: the student is wrong, by its confidence.  ``disagreements``: student and teacher name different
    classes, by the product of their confidences.  ``repaired`` and ``broken``: only distilled, or only the baseline,
    is right, by how much the probability of the true class changed.

    Args:
        answers: ``student`` (required), ``teacher``, ``baseline`` -> what was predicted for the same images.
        most: images of a group.

    Returns:
        group -> what was found; a group that needs a network which is not there is left out.

    Example:
        >>> student = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
        >>> pick({"student": Predictions.of(student, np.array([0, 0, 0]))}, most=1)
        {'mistakes': Pick(count=2, images=(2,))}
    """
    student = answers["student"]
    found = {"mistakes": _clearest(~student.correct, student.confidence, most)}
    if "teacher" in answers:
        teacher = answers["teacher"]
        both = student.confidence * teacher.confidence
        found["disagreements"] = _clearest(student.predicted != teacher.predicted, both, most)
    if "baseline" in answers:
        baseline = answers["baseline"]
        gain = student.of_label - baseline.of_label
        before, after = baseline.correct, student.correct
        found["repaired"] = _clearest(after & ~before, gain, most)
        found["broken"] = _clearest(before & ~after, -gain, most)
    return found


def _clearest(wanted: Array, clarity: Array, most: int) -> Pick:
    places = np.flatnonzero(wanted)
    order = places[np.argsort(-clarity[places], kind="stable")]
    return Pick(len(places), tuple(order[:most].tolist()))
