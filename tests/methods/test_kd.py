import math

import pytest
import torch
import torch.nn.functional as F

from potstill.errors import UsageError
from potstill.methods.kd import KD, kd_loss
from potstill.types import Batch, Outputs


def test_matches_the_formula_worked_by_hand():
    # softmax((4, 0) / 2) = (0.880797, 0.119203); KL to (0.5, 0.5); times 2 squared
    p = 1 / (1 + math.exp(-2))
    by_hand = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    loss = kd_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_is_the_divergence_from_teacher_to_student_and_not_the_other_way_round():
    student, teacher = torch.tensor([[1.0, 0.0, -3.0]]), torch.tensor([[0.0, 2.0, 0.5]])
    p, q = teacher.softmax(1), student.softmax(1)
    forward, backward = (p * (p / q).log()).sum().item(), (q * (q / p).log()).sum().item()
    assert forward != pytest.approx(backward, rel=1e-2)
    assert kd_loss(student, teacher, temperature=1.0).item() == pytest.approx(forward, rel=1e-5)


def test_is_averaged_over_the_batch_and_summed_over_classes():
    student, teacher = torch.tensor([[1.0, 0.0, -3.0]]), torch.tensor([[0.0, 2.0, 0.5]])
    one = kd_loss(student, teacher, temperature=3.0)
    eight = kd_loss(student.repeat(8, 1), teacher.repeat(8, 1), temperature=3.0)
    torch.testing.assert_close(one, eight)


def test_gradient_keeps_its_size_as_temperature_grows():
    sizes = []
    for temperature in (8.0, 64.0):
        student = torch.tensor([[0.1, -0.2, 0.3]], requires_grad=True)
        kd_loss(student, torch.tensor([[0.5, 0.1, -0.4]]), temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # without T squared: 64 times smaller


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e4])  # the last one by its series
def test_no_gradient_reaches_the_teacher(temperature):
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    kd_loss(student, teacher, temperature=temperature).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_half_precision_is_raised():
    student, teacher = torch.randn(4, 7).bfloat16(), torch.randn(4, 7).bfloat16()
    loss = kd_loss(student, teacher, temperature=4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(student.float(), teacher.float(), temperature=4.0), rtol=0, atol=0)


@pytest.mark.parametrize("gap", [50.0, 1000.0, 50000.0])
def test_is_finite_however_sure_both_are(gap):
    student = torch.tensor([[gap, 0.0, -gap]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-gap, 0.0, gap]]), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * gap, rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_is_the_weight_of_the_labels(alpha):
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    method = KD(temperature=2.0, alpha=alpha)
    terms = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))
    ce = terms.get("ce", torch.tensor(0.0))  # of weight 0 it is left out
    torch.testing.assert_close(ce, alpha * F.cross_entropy(student, labels))
    torch.testing.assert_close(terms["kd"], (1 - alpha) * kd_loss(student, teacher, temperature=2.0))


def test_confidence_weighs_images_without_labels_and_keeps_the_temperature_squared():
    student, teacher, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([2, -100, -100])
    method = KD(temperature=3.0, alpha=0.25, confidence="top")
    term = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(3, 3, 1, 1), labels))["kd"]
    weights = [1.0, *teacher[1:].softmax(1).amax(1).tolist()]
    each = [kd_loss(student[i : i + 1], teacher[i : i + 1], temperature=3.0).item() for i in range(3)]
    assert term.item() == pytest.approx(
        0.75 * sum(w * loss for w, loss in zip(weights, each, strict=True)) / 3, rel=1e-5
    )


def test_defaults_are_those_of_the_specification():
    assert (KD().temperature, KD().alpha) == (2.0, 0.5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": -1.0}, {"temperature": math.nan}])
def test_temperature_must_be_above_0(options):
    with pytest.raises(UsageError, match="temperature must be above 0, got"):
        KD(**options)
    with pytest.raises(UsageError, match="temperature must be above 0, got"):
        kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), **options)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, True, "0.5"])
def test_alpha_must_be_a_share(alpha):
    with pytest.raises(UsageError, match="alpha must be"):
        KD(alpha=alpha)
