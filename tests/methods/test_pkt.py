import math

import pytest
import torch
from made_outputs import made_batch, made_outputs

from potstill.errors import UsageError
from potstill.functional import pkt_loss
from potstill.methods.pkt import PKT


def slow_neighbours(rows):
    rows = [row / (row.norm() + 1e-7) for row in rows]
    similarity = [[(torch.dot(a, b).item() + 1) / 2 for b in rows] for a in rows]
    return [[value / sum(row) for value in row] for row in similarity]


def test_against_loops():
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    ours, theirs = slow_neighbours(student), slow_neighbours(teacher)
    wanted = (
        sum(theirs[i][j] * math.log((theirs[i][j] + 1e-7) / (ours[i][j] + 1e-7)) for i in range(4) for j in range(4))
        / 16
    )
    assert pkt_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-9)


def test_an_embedding_of_zeros_gets_no_gradient_and_spoils_no_other():
    student = torch.randn(4, 3)
    student[0] = 0
    student.requires_grad_()
    pkt_loss(student, torch.randn(4, 3)).backward()
    assert student.grad[0].eq(0).all()
    assert student.grad[1:].isfinite().all()
    assert student.grad[1:].norm() > 0


def test_term_is_weighted_and_the_teacher_is_constant():
    student, teacher = made_outputs(), made_outputs(seed=1, width=8)
    terms = PKT(weight=10)(student, teacher, made_batch())
    assert terms["neighbours"].item() == pytest.approx(10 * pkt_loss(student.embedding, teacher.embedding).item())
    terms["neighbours"].backward()
    assert student.maps[0].grad.norm() > 0
    assert teacher.maps[0].grad is None


def test_refuses_one_image():
    with pytest.raises(UsageError, match="pkt compares the images"):
        pkt_loss(torch.zeros(1, 3), torch.zeros(1, 3))
