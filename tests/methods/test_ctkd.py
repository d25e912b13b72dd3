import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.functional import ctkd_loss, ctkd_strength, kd_loss
from potstill.methods.ctkd import CTKD
from potstill.types import Batch, Outputs


def made(batch=4, classes=5):
    torch.manual_seed(0)
    return torch.randn(batch, classes, dtype=torch.float64), torch.randn(batch, classes, dtype=torch.float64)


def temperature(tau):
    return 1 + 20 / (1 + math.exp(-tau))


def test_is_hintons_loss_at_the_learnt_temperature():
    student, teacher = made()
    found = ctkd_loss(student, teacher, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(found, kd_loss(student, teacher, temperature=temperature(0.3)))


@pytest.mark.parametrize("strength", [-1.0, -0.25, 1.0])
def test_the_temperatures_gradient_is_multiplied_and_the_students_is_not(strength):
    student, teacher = made()
    student.requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ctkd_loss(student, teacher, tau, strength=strength).backward()
    at = [kd_loss(student.detach(), teacher, temperature=temperature(0.3 + step)).item() for step in (-1e-5, 1e-5)]
    numeric = (at[1] - at[0]) / 2e-5  # the factor T squared counts
    assert tau.grad.item() == pytest.approx(strength * numeric, rel=1e-5)
    plain = student.detach().clone().requires_grad_()
    kd_loss(plain, teacher, temperature=temperature(0.3)).backward()
    torch.testing.assert_close(student.grad, plain.grad)


def test_the_strength_falls_on_a_cosine_and_stays():
    assert ctkd_strength(0) == 0
    assert ctkd_strength(1) == pytest.approx(-0.0245, abs=1e-4)  # the first epoch of training
    assert ctkd_strength(5) == pytest.approx(-0.5)
    assert ctkd_strength(10) == ctkd_strength(240) == -1
    assert ctkd_strength(5, length=5) == -1


def test_an_optimizer_step_drives_the_temperature_against_the_student():
    student, teacher = made()
    method = CTKD().double()
    method.start_epoch(20, 240)
    batch = Batch(torch.zeros(4, 3, 1, 1), torch.arange(4))
    before = method(Outputs(student), Outputs(teacher), batch)["kd"]
    optimizer = torch.optim.SGD(method.parameters(), lr=10.0)
    before.backward()
    optimizer.step()
    assert method(Outputs(student), Outputs(teacher), batch)["kd"] > before


def test_weights_start_and_first_epoch_are_those_of_the_scripts():
    student, teacher = made()
    method = CTKD().double()
    method.start_epoch(0, 240)
    terms = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(4, 3, 1, 1), torch.arange(4)))
    assert temperature(1.0) == pytest.approx(15.62, abs=0.005)
    torch.testing.assert_close(terms["kd"], 0.9 * kd_loss(student, teacher, temperature=temperature(1.0)))
    torch.testing.assert_close(terms["ce"], 0.1 * torch.nn.functional.cross_entropy(student, torch.arange(4)))
    terms["kd"].backward()
    plain = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    ctkd_loss(student, teacher, plain, strength=1.0).backward()
    assert method.tau.grad.item() == pytest.approx(0.9 * ctkd_strength(1) * plain.grad.item(), rel=1e-9)


def test_wants_to_know_the_epoch():
    student, teacher = made()
    with pytest.raises(UsageError, match="ctkd changes with the epochs"):
        CTKD().distill(Outputs(student), Outputs(teacher), Batch(torch.zeros(4, 3, 1, 1), torch.arange(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[900.0, 0.0]], dtype=dtype, requires_grad=True)
    tau = torch.tensor(-30.0, dtype=dtype, requires_grad=True)  # T = 1
    loss = ctkd_loss(student, student.detach().flip(1), tau)
    loss.backward()
    assert loss.item() == pytest.approx(900, rel=1e-5)
    assert student.grad.isfinite().all()
    assert tau.grad.isfinite()
