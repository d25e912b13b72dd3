import math

import pytest
import torch

from potstill.functional import dtkd_loss, kd_loss
from potstill.methods.dtkd import DTKD
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return 1 + torch.rand(batch, classes) * 5, 1 + torch.rand(batch, classes) * 9


def slowly(student, teacher, temperature):
    total = 0.0
    for zs, zt in zip(student.tolist(), teacher.tolist(), strict=True):
        t_s, t_t = (2 * temperature * max(z) / (max(zs) + max(zt)) for z in (zs, zt))
        q, p = [math.exp(z / t_s) for z in zs], [math.exp(z / t_t) for z in zt]
        total += t_s * t_t * sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula_computed_slowly(temperature):
    student, teacher = made()
    found = dtkd_loss(student, teacher, temperature=temperature)
    assert found.item() == pytest.approx(slowly(student, teacher, temperature), rel=1e-4)


def test_is_hintons_loss_where_the_largest_logits_are_equal():
    student, teacher = made()
    student[:, 0] = teacher[:, 1] = 20.0
    torch.testing.assert_close(dtkd_loss(student, teacher, temperature=4.0), kd_loss(student, teacher, temperature=4.0))


def test_gradient_passes_through_the_students_temperature():
    student, teacher = (tensor.double() for tensor in made(batch=2))
    student.requires_grad_()
    dtkd_loss(student, teacher, temperature=4.0).backward()
    step = 1e-6
    for row, column in [(0, int(student[0].argmax())), (0, 0), (1, 3)]:
        moved = [student.detach().clone() for _ in range(2)]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        numeric = (slowly(moved[0], teacher, 4.0) - slowly(moved[1], teacher, 4.0)) / (2 * step)
        assert student.grad[row, column].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("peak", [0.0, -3.0, 1e-30])
def test_takes_the_plain_temperature_where_a_largest_logit_says_nothing(peak):
    student = torch.tensor([[peak, -8.0, -9.0]], requires_grad=True)
    teacher = torch.tensor([[5.0, 1.0, 0.0]])
    for pair in [(student, teacher), (teacher, student)]:
        torch.testing.assert_close(dtkd_loss(*pair, temperature=4.0), kd_loss(*pair, temperature=4.0))
    dtkd_loss(student, teacher, temperature=4.0).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[900.0, 0.0], [0.5, -900.0]], dtype=dtype, requires_grad=True)
    loss = dtkd_loss(student, torch.tensor([[0.5, -900.0], [-900.0, 900.0]], dtype=dtype), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_both_parts_are_weighted_and_warmed_up():
    student, teacher = made()
    method = DTKD()
    method.start_epoch(9, 240)
    terms = method(
        Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), torch.zeros(6, dtype=torch.int64))
    )
    assert terms["dtkd"].item() == pytest.approx(1.5 * slowly(student, teacher, 4.0), rel=1e-4)
    torch.testing.assert_close(terms["kd"], 0.5 * kd_loss(student, teacher, temperature=4.0))
