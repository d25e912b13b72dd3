"""Which images of the target teach the student: those of which its teacher is sure, and those with a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.data.unlabeled import NO_LABEL
from potstill.errors import UsageError
from potstill.evaluation.averages import Array

LOWER = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)  # thresholds that a message looks at
_SHOWN = 10  # classes that a sentence names

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Trusted:
    """Images of the target that the student learns from."""

    index: Ids  # [M], of all target images for training, rising
    labels: Ids  # [M]: class ids where the label may be used, else -100
    groups: Ids  # [M]: class ids; the label where it may be used, else what the teacher says

    def counts(self, class_names: Sequence[str]) -> dict[str, int]:
        """Images by the class of their group."""
        found = np.bincount(self.groups, minlength=len(class_names))
        return dict(zip(class_names, found.tolist(), strict=True))

    def sentence(self, class_names: Sequence[str], of: int, confidence: float) -> str:
        """For people: how many, and of which classes."""
        counts = self.counts(class_names)
        said = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_SHOWN])
        more = f" and {len(counts) - _SHOWN} more classes" if len(counts) > _SHOWN else ""
        known = int((self.labels != NO_LABEL).sum())
        labelled = f", {known:,} of them with their label" if known else ""
        return (
            f"{len(self.index):,} of {of:,} target images teach the student{labelled} (teacher's confidence "
            f"at least {confidence:g}); by class as the teacher sees it: {said}{more}"
        )


def choose(probabilities: Array, labels: Ids, confidence: float) -> Trusted:
    """The images of which the teacher is sure enough, and those whose label may be used.

    Args:
        probabilities: [N, K], the teacher's; of equal ones the lower class comes first.
        labels: [N] class ids where they may be used, else -100.
        confidence: least probability of the first class, from 0 to 1.

    Raises:
        UsageError: nothing is left; says how many would be at lower thresholds.
    """
    sure, said = probabilities.max(axis=1), probabilities.argmax(axis=1).astype(np.int64)
    known = labels != NO_LABEL
    index = np.flatnonzero((sure >= confidence) | known)
    if len(index) == 0:
        lower = ", ".join(f"{int((sure >= each).sum()):,} at {each:g}" for each in LOWER if each < confidence)
        raise UsageError(
            f"domain.confidence {confidence:g} leaves none of {len(sure):,} target images to learn from: the teacher's "
            f"confidence is {sure.max():.3f} at most.\nAt lower thresholds there would be: {lower}\n"
            "Lower domain.confidence, set domain.adapt_batch_norm=true, or train the teacher longer"
        )
    return Trusted(index, labels[index], np.where(known, labels, said)[index])
