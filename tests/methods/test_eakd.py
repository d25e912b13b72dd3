import math

import pytest
import torch

from potstill.functional import eakd_loss, kd_loss
from potstill.methods.eakd import EAKD
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return 2 * torch.randn(batch, classes), 2 * torch.randn(batch, classes)


def shares(logits, temperature):
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities)


@pytest.mark.parametrize(("form", "bound"), [("paper", math.log(5)), ("release", 100.0)])
def test_equals_the_formula_computed_slowly(form, bound):
    student, teacher = made()
    total = 0.0
    for zs, zt in zip(student.tolist(), teacher.tolist(), strict=True):
        h_s, h_t = entropy(shares(zs, 3)), entropy(shares(zt, 3))
        divergence = sum(p * math.log(p / q) for p, q in zip(shares(zt, 4), shares(zs, 4), strict=True))
        total += (h_t + h_t * h_s / bound) / 2 * 16 * divergence
    assert eakd_loss(student, teacher, form=form).item() == pytest.approx(total / 6, rel=1e-4)


def test_the_weight_passes_no_gradient():
    student, teacher = made(batch=1)
    student.requires_grad_()
    eakd_loss(student, teacher, temperature=1.0).backward()
    h_s, h_t = (entropy(shares(z[0].tolist(), 3)) for z in (student.detach(), teacher))
    weight = h_t * (1 + h_s / math.log(5)) / 2
    torch.testing.assert_close(student.grad, weight * (student.detach().softmax(1) - teacher.softmax(1)))


def test_a_wholly_unsure_student_counts_a_teachers_entropy_once():
    student, teacher = torch.zeros(1, 5), made(batch=1)[1]
    h_t = entropy(shares(teacher[0].tolist(), 3))
    found = eakd_loss(student, teacher) / kd_loss(student, teacher, temperature=4.0)
    assert found.item() == pytest.approx(h_t, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wholly_sure_teacher_has_no_weight_and_all_is_finite(dtype):
    student = torch.tensor([[-9000.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = eakd_loss(student, -student.detach())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_weights_are_those_of_the_release():
    student, teacher = made()
    terms = EAKD()(
        Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), torch.zeros(6, dtype=torch.int64))
    )
    torch.testing.assert_close(terms["kd"], 0.9 * eakd_loss(student, teacher))
    ce = torch.nn.functional.cross_entropy(student, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(terms["ce"], 0.1 * ce)
