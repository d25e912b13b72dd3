"""Against the definition in 60 digits."""

import mpmath
import pytest
import torch

from potstill.functional import (
    camkd_logit_loss,
    crld_within_loss,
    dkd_loss,
    dtkd_loss,
    eakd_loss,
    kd_loss,
    mcd_loss,
    nckd_loss,
    sdd_dkd_loss,
    sdd_kd_loss,
    tckd_loss,
)
from potstill.methods.numerics import confidence_weights, softened_kl, softened_target_kl

mpmath.mp.dps = 60


def by_definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[float, torch.Tensor]:
    """T^2 KL, averaged over rows, and its gradient T (q - p) / B in the student's logits."""
    total, gradient = mpmath.mpf(0), []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        powers = [[mpmath.exp(mpmath.mpf(z) / temperature) for z in row] for row in (ours, theirs)]
        q, p = ([power / sum(row) for power in row] for row in powers)
        total += sum(b * mpmath.log(b / a) for a, b in zip(q, p, strict=True))
        gradient.append([float(temperature * (a - b) / len(student)) for a, b in zip(q, p, strict=True)])
    return float(mpmath.mpf(temperature) ** 2 * total / len(student)), torch.tensor(gradient, dtype=torch.float64)


def logits(classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (scale * torch.randn(3, classes, generator=generator) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("temperature", [1.0, 4.0, 8.0, 20.0, 50.0, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (10, 3.0), (100, 8.0)])
def test_value_and_gradient_at_any_temperature(temperature: float, classes: int, scale: float) -> None:
    student, teacher = logits(classes, scale)
    value, gradient = by_definition(student, teacher, temperature)
    student.requires_grad_(True)
    loss = kd_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert student.grad is not None
    assert ((student.grad.double() - gradient).norm() / gradient.norm()).item() < 1e-5


def test_a_tensors_gradient_is_that_of_the_definition() -> None:
    """d KL / d T by a difference quotient of the definition, at a temperature of the series."""
    student, teacher = logits(10, 3.0)
    temperature = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    softened_kl(student.double(), teacher.double(), temperature).mean().backward()
    low, high = (by_definition(student, teacher, t)[0] / t**2 for t in (99.99, 100.01))
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx((high - low) / 0.02, rel=1e-6)


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    student, _ = logits(100, 8.0)
    assert softened_kl(student, student, 1e4).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, T: crld_within_loss(s, s, t, t, temperature=T, threshold=0.0) / 2,
        lambda s, t, T: nckd_loss(
            *(torch.cat([torch.ones(3, 1), each], dim=1) for each in (s, t)),
            torch.zeros(3, dtype=torch.int64),
            temperature=T,
        ),
        # Two equal teachers: each weighs 1/2, and the sum over them is halved.
        lambda s, t, T: 2 * camkd_logit_loss(s, [t, t], torch.tensor([0, 1, 2]), temperature=T),
    ],
    ids=["crld", "nckd", "camkd"],
)
def test_other_losses_of_this_kind_are_as_exact(loss) -> None:  # type: ignore[no-untyped-def]
    student, teacher = logits(10, 3.0)
    assert loss(student, teacher, 1e5).item() == pytest.approx(by_definition(student, teacher, 1e5)[0], rel=1e-5)


LABELS = torch.tensor([0, 4, 9])


@pytest.mark.parametrize("temperature", [8.0, 100.0, 1e4])
@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, T: tckd_loss(s, t, LABELS, temperature=T),
        lambda s, t, T: dkd_loss(s, t, LABELS, temperature=T, alpha=1.0, beta=1.0),
        lambda s, t, T: dtkd_loss(s, t, temperature=T),
        lambda s, t, T: eakd_loss(s, t, temperature=T, entropy_temperature=3.0),
        lambda s, t, T: mcd_loss(s, t, LABELS, temperature=T),
        lambda s, t, T: sdd_kd_loss(torch.stack([s, t], 2), torch.stack([t, s], 2), LABELS, temperature=T),
        lambda s, t, T: sdd_dkd_loss(torch.stack([s, t], 2), torch.stack([t, s], 2), LABELS, temperature=T),
    ],
    ids=["tckd", "dkd", "dtkd", "eakd", "mcd", "sdd_kd", "sdd_dkd"],
)
def test_float32_gives_what_float64_gives(loss, temperature: float) -> None:  # type: ignore[no-untyped-def]
    student, teacher = logits(10, 3.0)
    found = []
    for dtype in (torch.float32, torch.float64):
        ours = student.detach().to(dtype).clone().requires_grad_(True)
        value = loss(ours, teacher.to(dtype), temperature)
        value.backward()
        assert ours.grad is not None
        found.append((value.item(), ours.grad.double()))
    (value, gradient), (exact, exact_gradient) = found
    assert value == pytest.approx(exact, rel=1e-5)
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 1e4])  # the second by the series
def test_no_gradient_reaches_the_teacher(temperature):
    student, teacher, labels = (
        torch.randn(3, 5, requires_grad=True),
        torch.randn(3, 5, requires_grad=True),
        torch.arange(3),
    )
    (
        softened_kl(student, teacher, temperature) + softened_target_kl(student, teacher, labels, temperature)
    ).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    for kind in ("top", "entropy"):
        assert not confidence_weights(teacher, torch.full_like(labels, -100), kind).requires_grad
