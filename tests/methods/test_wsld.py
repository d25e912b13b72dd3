import math

import pytest
import torch
import torch.nn.functional as F

from potstill.functional import wsld_loss
from potstill.methods.wsld import WSLD
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return torch.randn(batch, classes), torch.randn(batch, classes), torch.randint(classes, (batch,))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula_computed_slowly(temperature):
    student, teacher, labels = made()
    total = 0.0
    for zs, zt, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        errors = [-math.log(math.exp(z[y]) / sum(map(math.exp, z))) for z in (zs, zt)]
        weight = 1 - math.exp(-errors[0] / errors[1])
        p, q = ([math.exp(z / temperature) for z in row] for row in (zt, zs))
        total -= weight * sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
    found = wsld_loss(student, teacher, labels, temperature=temperature)
    assert found.item() == pytest.approx(temperature**2 * total / 6, rel=1e-5)


def test_the_weight_passes_no_gradient():
    student, teacher, labels = made(batch=1)
    student.requires_grad_()
    wsld_loss(student, teacher, labels, temperature=1.0).backward()
    values = student.detach()
    weight = 1 - torch.exp(-F.cross_entropy(values, labels) / F.cross_entropy(teacher, labels))
    torch.testing.assert_close(student.grad, weight * (values.softmax(1) - teacher.softmax(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_without_error_gives_the_whole_weight(dtype):
    student = torch.tensor([[-900.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = wsld_loss(student, -student.detach(), torch.tensor([0]), temperature=1.0)
    assert loss.item() == pytest.approx(900, rel=1e-6)
    loss.backward()
    assert student.grad.isfinite().all()


def test_a_student_without_error_learns_nothing_more():
    teacher = torch.zeros(1, 2)
    assert wsld_loss(torch.tensor([[900.0, 0.0]]), teacher, torch.tensor([0])).item() == 0


def test_alpha_weighs_the_soft_targets():
    student, teacher, labels = made()
    terms = WSLD()(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))
    torch.testing.assert_close(terms["wsld"], 2.5 * wsld_loss(student, teacher, labels, temperature=2.0))
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student, labels))
