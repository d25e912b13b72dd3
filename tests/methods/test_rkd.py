import pytest
import torch
from made_outputs import made_batch, made_outputs

from potstill.errors import UsageError
from potstill.functional import rkd_angle_loss, rkd_distance_loss
from potstill.methods.rkd import RKD


def smooth_l1(a, b):
    distance = abs(a - b)
    return distance**2 / 2 if distance < 1 else distance - 0.5


def slow_distances(rows):
    pairs = [[(a - b).pow(2).sum().item() ** 0.5 for b in rows] for a in rows]
    different = [pairs[i][j] for i in range(len(rows)) for j in range(len(rows)) if i != j]
    mean = sum(different) / len(different)
    return [[value / mean for value in row] for row in pairs]


def slow_cosine(rows, j, i, k):
    first, second = rows[j] - rows[i], rows[k] - rows[i]
    length = (first.norm() * second.norm()).item()
    return torch.dot(first, second).item() / length if length else 0.0


def test_against_loops_over_pairs_and_triples():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    ours, theirs = slow_distances(student), slow_distances(teacher)
    places = range(5)
    wanted = sum(smooth_l1(ours[i][j], theirs[i][j]) for i in places for j in places) / 25
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    wanted = (
        sum(
            smooth_l1(slow_cosine(student, j, i, k), slow_cosine(teacher, j, i, k))
            for i in places
            for j in places
            for k in places
        )
        / 125
    )
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def test_images_that_nearly_coincide_keep_their_distances_in_float32():
    # |a|^2 + |b|^2 - 2ab would leave nothing of a distance of 1e-3 between rows of length 1000.
    student = torch.tensor([[1000.0, 0.0], [1000.0, 0.001], [1000.0, 0.003]])
    teacher = torch.tensor([[0.0], [1.0], [3.0]])
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_equal_images_are_finite():
    student = torch.zeros(4, 3, requires_grad=True)
    loss = rkd_distance_loss(student, torch.randn(4, 3)) + rkd_angle_loss(student, torch.randn(4, 3))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_terms_are_weighted_and_the_teacher_is_constant():
    student, teacher, batch = made_outputs(), made_outputs(seed=1, width=7), made_batch()
    terms = RKD()(student, teacher, batch)
    assert terms["distance"].item() == pytest.approx(
        25 * rkd_distance_loss(student.embedding, teacher.embedding).item()
    )
    assert terms["angle"].item() == pytest.approx(50 * rkd_angle_loss(student.embedding, teacher.embedding).item())
    (terms["distance"] + terms["angle"]).backward()
    assert student.maps[0].grad.norm() > 0
    assert teacher.maps[0].grad is None
    assert set(RKD(angle_weight=0)(student, teacher, batch)) == {"ce", "distance"}


def test_refuses_one_image():
    for loss in (rkd_distance_loss, rkd_angle_loss):
        with pytest.raises(UsageError, match="needs 2 or more, got 1"):
            loss(torch.zeros(1, 3), torch.zeros(1, 3))
