import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.functional import mcd_loss, nckd_loss, rld_loss, scd_loss, tckd_loss
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.rld import RLD
from potstill.types import Batch, Outputs


def made(batch=8, classes=5):
    torch.manual_seed(0)
    return 3 * torch.randn(batch, classes), 3 * torch.randn(batch, classes), torch.randint(classes, (batch,))


def slowly(student, teacher, labels, temperature, confidence_temperature):
    confidence = correlation = 0.0
    for zs, zt, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = ([math.exp(z / confidence_temperature) for z in row] for row in (zt, zs))
        most, mine = max(p) / sum(p), q[y] / sum(q)
        confidence += most * math.log(most / mine) + (1 - most) * math.log((1 - most) / (1 - mine))
        below = [k for k in range(len(zt)) if zt[k] < zt[y]]
        p, q = ([math.exp(row[k] / temperature) for k in below] for row in (zt, zs))
        correlation += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return confidence_temperature**2 * confidence / len(labels), temperature**2 * correlation / len(labels)


@pytest.mark.parametrize(("temperature", "confidence_temperature"), [(4.0, 1.0), (1.0, 4.0)])
def test_equals_the_formula_computed_slowly(temperature, confidence_temperature):
    given = made()
    confidence, correlation = slowly(*given, temperature, confidence_temperature)
    assert scd_loss(*given, temperature=confidence_temperature).item() == pytest.approx(confidence, rel=1e-5)
    assert mcd_loss(*given, temperature=temperature).item() == pytest.approx(correlation, rel=1e-5)
    temperatures = {"temperature": temperature, "confidence_temperature": confidence_temperature}
    whole = rld_loss(*given, **temperatures, alpha=0.5, beta=3.0)
    assert whole.item() == pytest.approx(0.5 * confidence + 3 * correlation, rel=1e-5)


def test_is_dkd_where_the_teacher_is_right():
    student, teacher, _ = made()
    labels = teacher.argmax(dim=1)
    torch.testing.assert_close(scd_loss(student, teacher, labels), tckd_loss(student, teacher, labels, temperature=1.0))
    torch.testing.assert_close(
        mcd_loss(student, teacher, labels, temperature=4.0), nckd_loss(student, teacher, labels, temperature=4.0)
    )


def test_a_label_that_the_teacher_ranks_last_adds_nothing():
    student, teacher, _ = made()
    student.requires_grad_()
    loss = mcd_loss(student, teacher, teacher.argmin(dim=1))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 900.0, 0.0], [900.0, 0.0, -900.0]], dtype=dtype)
    labels = torch.tensor([0, 0])
    # Both teachers are sure.  The first student is sure of the label too: 0; the second has log q = -900 - ln 2.
    confidence = scd_loss(student, teacher, labels)
    assert confidence.item() == pytest.approx((900 + math.log(2)) / 2, rel=1e-6)
    # first image: 0 and 2 are equal, none below the label; second: (1, 0) against (1/2, 1/2)
    correlation = mcd_loss(student, teacher, labels, temperature=1.0)
    assert correlation.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    (confidence + correlation).backward()
    assert student.grad.isfinite().all()


def test_a_student_sure_of_the_wrong_class_is_finite_where_one_minus_p_is_0():
    student = torch.tensor([[900.0, 0.0, 0.0]], requires_grad=True)
    loss = scd_loss(student, torch.zeros(1, 3), torch.tensor([0]))
    # (1/3, 2/3) against (1, 2 exp(-900))
    by_hand = 1 / 3 * math.log(1 / 3) + 2 / 3 * (math.log(2 / 3) + 900 - math.log(2))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert student.grad.isfinite().all()


def test_two_classes_are_refused_by_the_method():
    student, teacher, labels = made(classes=2)
    assert mcd_loss(student, teacher, labels).item() == 0
    side = NetworkInfo(Outputs(student))
    with pytest.raises(UsageError, match=r"rld .* Use method kd"):
        RLD().build(side, side, TrainingInfo(classes=2))
    with pytest.raises(UsageError, match=r"rld .* Use method kd"):
        RLD(warmup_epochs=0)(Outputs(student), Outputs(teacher), Batch(torch.zeros(8, 3, 1, 1), labels))


def test_weights_rise_evenly_from_the_first_epoch():
    student, teacher, labels = made()
    confidence, correlation = slowly(student, teacher, labels, 4.0, 1.0)
    method = RLD()
    method.start_epoch(4, 240)
    terms = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(8, 3, 1, 1), labels))
    assert terms["scd"].item() == pytest.approx(confidence / 4, rel=1e-5)
    assert terms["mcd"].item() == pytest.approx(8 * correlation / 4, rel=1e-5)
