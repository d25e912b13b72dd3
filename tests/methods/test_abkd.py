import math

import pytest
import torch

from potstill.functional import abkd_loss, kd_loss
from potstill.methods.abkd import ABKD
from potstill.types import Batch, Outputs

LIMITS = [(0.5, 0.0), (1.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.0, 0.0), (0.7, -0.7), (-0.4, 0.4)]


def made(batch=4, classes=5):
    torch.manual_seed(0)
    return torch.randn(batch, classes, dtype=torch.float64), torch.randn(batch, classes, dtype=torch.float64)


def slowly(student, teacher, alpha, beta, temperature):
    total = 0.0
    for p_row, q_row in zip(
        (teacher / temperature).softmax(1).tolist(), (student / temperature).softmax(1).tolist(), strict=True
    ):
        for p, q in zip(p_row, q_row, strict=True):
            both = alpha + beta
            bracket = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
            total -= bracket / (alpha * beta)
    return total / len(student)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (1.0, 1.0), (0.2, 1.5), (1.5, -0.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula_computed_slowly(alpha, beta, temperature):
    student, teacher = made()
    found = abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=temperature)
    assert found.item() == pytest.approx(slowly(student, teacher, alpha, beta, temperature), rel=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), LIMITS)
def test_the_cases_where_the_formula_breaks_off_are_its_limits(alpha, beta):
    student, teacher = made()
    near = slowly(student, teacher, alpha + 1.1e-5, beta + 0.7e-5, 1.0)
    assert abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=1.0).item() == pytest.approx(near, rel=1e-3)


def test_corners_are_the_known_divergences():
    student, teacher = made()
    p, q = teacher.softmax(1), student.softmax(1)
    forward, backward = (p * (p / q).log()).sum(1).mean(), (q * (q / p).log()).sum(1).mean()
    hellinger = 2 * (p.sqrt() - q.sqrt()).square().sum(1).mean()  # four times half the squared distance
    squares = ((q.log() - p.log()) ** 2).sum(1).mean() / 2
    euclid = ((p - q) ** 2).sum(1).mean() / 2
    for (alpha, beta), expected in {
        (1.0, 0.0): forward,
        (0.0, 1.0): backward,
        (0.5, 0.5): hellinger,
        (0.0, 0.0): squares,
        (1.0, 1.0): euclid,
    }.items():
        torch.testing.assert_close(abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=1.0), expected)


def test_there_is_no_factor_t_squared():
    student, teacher = made()
    found = abkd_loss(student, teacher, alpha=1.0, beta=0.0, temperature=4.0)
    torch.testing.assert_close(found, kd_loss(student, teacher, temperature=4.0) / 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_is_finite_at_a_gap_of_900(alpha, beta, dtype):
    student = torch.tensor([[900.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = abkd_loss(student, student.detach().flip(1), alpha=alpha, beta=beta, temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if (alpha, beta) == (0.8, 0.3):  # p and q share nothing: (0.8 + 0.3) / 1.1 / 0.24
        assert loss.item() == pytest.approx(1 / 0.24, rel=1e-6)


def test_default_weight_is_the_authors_example():
    student, teacher = made()
    terms = ABKD()(Outputs(student), Outputs(teacher), Batch(torch.zeros(4, 3, 1, 1), torch.arange(4)))
    by_hand = 32 * slowly(student, teacher, 0.8, 0.3, 4.0)
    assert terms["abkd"].item() == pytest.approx(by_hand, rel=1e-9)
    assert math.isfinite(terms["ce"].item())
