import math

import numpy as np
import pytest
from scipy.stats import entropy

from potstill.errors import UsageError
from potstill.evaluation.fidelity import agreement, class_order, cosine_agreement


def test_agreement_counts_equal_top_classes_right_or_wrong():
    student = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    teacher = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]])
    assert agreement(student, teacher)["agreement"] == pytest.approx(2 / 3)


def test_kl_is_the_teachers_distribution_from_the_students():
    rng = np.random.default_rng(0)
    student, teacher = rng.dirichlet(np.ones(7), 50), rng.dirichlet(np.ones(7) / 3, 50)
    assert agreement(student, teacher)["kl_to_teacher"] == pytest.approx(entropy(teacher, student, axis=1).mean())
    one = agreement(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]))["kl_to_teacher"]
    assert one == pytest.approx(math.log(2))  # the other way round it would be infinite


def test_a_student_that_rules_out_the_teachers_class_stays_finite():
    value = agreement(np.array([[0.0, 1.0]], np.float32), np.array([[1.0, 0.0]], np.float32))["kl_to_teacher"]
    assert value == pytest.approx(-math.log(2**-126))


def test_identical_models():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 9).astype(np.float32)
    assert agreement(p, p) == {"agreement": 1.0, "kl_to_teacher": 0.0}


def test_no_images_and_wrong_shapes():
    assert agreement(np.zeros((0, 3)), np.zeros((0, 3))) == {"agreement": None, "kl_to_teacher": None}
    with pytest.raises(UsageError, match="same"):
        agreement(np.zeros((2, 3)), np.zeros((2, 4)))


def test_embeddings_agree_as_far_as_a_linear_map_reaches():
    """Of a teacher with two independent directions of equal spread, a student that knows one has cosine 2 / pi: the
    mean of |cos| over all angles.  The teacher's mean, common to all images, counts nothing."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 6000)
    teacher = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 100
    half = 5 * teacher[:, :1] - 7
    noise = np.random.default_rng(1).normal(size=(6000, 1))
    found = [
        float(cosine_agreement((student[:3000], teacher[:3000]), (student[3000:], teacher[3000:])).mean())
        for student in (half, noise, np.concatenate([half, 3 * teacher[:, 1:]], axis=1))
    ]
    assert found == pytest.approx([2 / np.pi, 0.0, 1.0], abs=0.02)


def test_two_classes_that_are_swapped_are_found():
    labels = np.repeat([0, 1, 2, 3], 20)
    predicted = np.array([0, 2, 1, 3])[labels]
    predicted[:2] = 3  # and two errors
    assert class_order(predicted, labels, 4).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_a_weak_model_has_no_other_order(share):
    """Of 24 orders one always fits a little better: none is reported over a hundred models that guess."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 15)
    for _ in range(100):
        predicted = np.where(draw.random(60) < share, labels, draw.integers(0, 4, 60))
        assert class_order(predicted, labels, 4) is None


def test_the_order_of_a_weak_model_is_found_too():
    draw, order = np.random.default_rng(0), np.roll(np.arange(10), 3)
    labels = np.repeat(np.arange(10), 30)
    outputs = np.argsort(order)[labels]  # output i stands for class order[i]
    predicted = np.where(draw.random(300) < 0.4, outputs, draw.integers(0, 10, 300))
    assert (order[predicted] == labels).mean() < 0.5  # most of its predictions are wrong in any order
    assert class_order(predicted, labels, 10).tolist() == order.tolist()
    assert class_order(np.full(300, 3), np.repeat([0, 3], [290, 10]), 10) is None  # one class alone: no order
