import math

import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.errors import UsageError
from potstill.functional import itrd_correlation_loss, itrd_mutual_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.itrd import ITRD


def test_correlation_against_loops():
    student, teacher = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    total = 0.0
    for ours, theirs in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
        means = sum(ours) / 6, sum(theirs) / 6
        sigmas = [
            math.sqrt(sum((x - mean) ** 2 for x in column) / 5)
            for column, mean in zip((ours, theirs), means, strict=True)
        ]
        c = (
            sum((a - means[0]) * (b - means[1]) for a, b in zip(ours, theirs, strict=True))
            / (sigmas[0] * sigmas[1])
            / 6
        )
        total += abs(c - 1) ** 3
    assert itrd_correlation_loss(student, teacher).item() == pytest.approx(math.log2(total), rel=1e-12)


def test_equal_features_correlate_by_n_minus_1_over_n():
    both = torch.randn(5, 4, dtype=torch.float64)
    assert itrd_correlation_loss(both, both).item() == pytest.approx(math.log2(4 * (1 / 5) ** 3))


def test_mutual_against_loops():
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def cosines(rows):
        return [[(torch.dot(a, b) / (a.norm() * b.norm())).item() for b in rows] for a in rows]

    ours, theirs = cosines(student), cosines(teacher)
    # Diagonals are 1, so both traces are 4.
    wanted = sum((ours[i][j] / 4) ** 2 - (ours[i][j] * theirs[i][j] / 4) ** 2 for i in range(4) for j in range(4))
    assert itrd_mutual_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def test_a_feature_that_never_changes_is_finite():
    student = torch.zeros(4, 3, requires_grad=True)
    teacher = torch.randn(4, 3)
    teacher[:, 0] = 0
    loss = itrd_correlation_loss(student, teacher) + itrd_mutual_loss(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("width", [5, 8])
def test_terms(width):
    student, teacher = made_outputs(), made_outputs(seed=1, width=width)
    method = ITRD()
    method.build(side(student), side(teacher), TrainingInfo(3))
    terms = method.distill(student, teacher, made_batch())
    embedded = method.embed(student.embedding)
    wanted = itrd_correlation_loss(embedded, teacher.embedding)
    assert terms["correlation"].item() == pytest.approx(2 * wanted.item())
    alike = student.embedding if width == 5 else embedded
    assert terms["mutual"].item() == pytest.approx(itrd_mutual_loss(alike, teacher.embedding).item())
    sum(terms.values()).backward()
    assert method.embed.weight.grad.norm() > 0
    assert teacher.maps[0].grad is None


def test_refuses_one_image():
    for loss in (itrd_correlation_loss, itrd_mutual_loss):
        with pytest.raises(UsageError, match="itrd compares the images"):
            loss(torch.zeros(1, 3), torch.zeros(1, 3))
