"""Threshold and groups, worked by hand."""

import numpy as np
import pytest

from potstill.errors import UsageError
from potstill.experiment.domain_adaptation import select_pseudo_labels

SAID = np.array(
    [
        [0.90, 0.05, 0.05],  # exactly at the threshold: taken
        [0.10, 0.20, 0.70],
        [0.04, 0.95, 0.01],
        [0.34, 0.33, 0.33],
        [0.02, 0.02, 0.96],
    ]
)
NOBODY = np.full(5, -100)


def test_images_of_which_the_teacher_is_sure_teach_without_labels() -> None:
    found = select_pseudo_labels(SAID, NOBODY, 0.9)
    assert found.index.tolist() == [0, 2, 4]
    assert found.labels.tolist() == [-100, -100, -100]
    assert found.groups.tolist() == [0, 1, 2]
    assert select_pseudo_labels(SAID, NOBODY, 0.0).index.tolist() == [0, 1, 2, 3, 4]
    assert select_pseudo_labels(SAID, NOBODY, 0.7).groups.tolist() == [0, 2, 1, 2]


def test_a_label_that_may_be_used_overrules_threshold_and_teacher() -> None:
    labels = np.array([-100, -100, 0, 1, -100])
    found = select_pseudo_labels(SAID, labels, 0.95)
    assert found.index.tolist() == [2, 3, 4]
    assert found.labels.tolist() == [0, 1, -100]
    assert found.groups.tolist() == [0, 1, 2]  # the teacher says 1 and 0 of the first two
    assert found.counts(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}


def test_a_threshold_that_leaves_nothing_says_what_lower_ones_would() -> None:
    with pytest.raises(UsageError) as caught:
        select_pseudo_labels(SAID, NOBODY, 0.99)
    assert str(caught.value).splitlines() == [
        "domain.confidence 0.99 leaves none of 5 target images: the teacher's confidence is 0.960 at most.",
        "Images at lower thresholds: 2 at 0.95, 3 at 0.9, 3 at 0.8, 4 at 0.7, 4 at 0.6, 4 at 0.5, "
        "4 at 0.4, 5 at 0.3, 5 at 0",
        "Lower domain.confidence, set domain.adapt_batch_norm=true, or train the teacher longer",
    ]


def test_the_sentence_counts_by_class_as_the_teacher_sees_it() -> None:
    found = select_pseudo_labels(SAID, np.array([-100, 1, -100, -100, -100]), 0.9)
    assert found.sentence(["cat", "dog", "owl"], 5, 0.9) == (
        "4 of 5 target images are used for training, 1 of them with their label (teacher's confidence at least 0.9); "
        "by predicted class: cat 1, dog 2, owl 1"
    )
