import pytest
import torch
from made_outputs import made_batch, made_outputs

from potstill.errors import UsageError
from potstill.functional import sp_loss
from potstill.methods.sp import SP


def slow_rows(features):
    rows = features.flatten(1)
    gram = [[torch.dot(a, b).item() for b in rows] for a in rows]
    return [[value / sum(entry**2 for entry in row) ** 0.5 for value in row] for row in gram]


def test_against_loops_with_unequal_channels_and_sizes():
    student, teacher = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    ours, theirs = slow_rows(student), slow_rows(teacher)
    wanted = sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert sp_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def test_autocast_does_not_round_the_similarities():
    student, teacher = torch.randn(8, 64), torch.randn(8, 64)
    plain = sp_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sp_loss(student, teacher), plain)


def test_half_precision_is_raised():
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    assert sp_loss(student, teacher).item() == pytest.approx(
        sp_loss(student.double(), teacher.double()).item(), rel=1e-5
    )


def test_term_is_weighted_and_the_teacher_is_constant():
    student, teacher = made_outputs(), made_outputs(seed=1)
    terms = SP(ce_weight=0)(student, teacher, made_batch())
    assert terms.keys() == {"similarity"}
    assert terms["similarity"].item() == pytest.approx(3000 * sp_loss(student.maps[0], teacher.maps[0]).item())
    terms["similarity"].backward()
    assert student.maps[0].grad.norm() > 0
    assert teacher.maps[0].grad is None


def test_refuses_one_image():
    with pytest.raises(UsageError, match="sp compares the images of a batch with each other: it needs 2"):
        sp_loss(torch.zeros(1, 3), torch.zeros(1, 3))
