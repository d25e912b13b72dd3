import math

import pytest
import torch

from potstill.functional import kd_loss, tfkd_reg_loss, tfkd_self_loss
from potstill.methods import create_method
from potstill.methods.tfkd import TfKDReg, TfKDSelf
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return 3 * torch.randn(batch, classes), 3 * torch.randn(batch, classes), torch.randint(classes, (batch,))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_hand_made_teacher_is_a_softmax_over_probabilities(temperature):
    student, _, labels = made()
    total = 0.0
    for logits, label in zip(student.tolist(), labels.tolist(), strict=True):
        made_up = [math.exp((0.9 if k == label else 0.1 / 4) / temperature) for k in range(5)]
        q = [math.exp(z) for z in logits]  # the student at temperature 1
        for a, b in zip(made_up, q, strict=True):
            total += a / sum(made_up) * math.log(a / sum(made_up) / (b / sum(q)))
    options = {"temperature": temperature, "correct": 0.9}
    mean = tfkd_reg_loss(student, labels, **options)
    assert mean.item() == pytest.approx(total / (6 * 5), rel=1e-5)
    batchmean = tfkd_reg_loss(student, labels, **options, reduction="batchmean")
    assert batchmean.item() == pytest.approx(total / 6, rel=1e-5)


def test_the_earlier_self_is_hintons_loss_over_the_number_of_classes():
    student, teacher, _ = made()
    whole = kd_loss(student, teacher, temperature=6.0)
    torch.testing.assert_close(tfkd_self_loss(student, teacher, temperature=6.0), whole / 5)
    torch.testing.assert_close(tfkd_self_loss(student, teacher, temperature=6.0, reduction="batchmean"), whole)


def test_alpha_is_the_weight_of_the_teacher_and_labels_get_the_rest():
    student, teacher, labels = made()
    batch = Batch(torch.zeros(6, 3, 1, 1), labels)
    ce = torch.nn.functional.cross_entropy(student, labels)
    terms = TfKDReg(alpha=0.3, multiplier=10.0)(Outputs(student), None, batch)
    torch.testing.assert_close(terms["ce"], 0.7 * ce)
    torch.testing.assert_close(terms["tfkd"], 3.0 * tfkd_reg_loss(student, labels))
    terms = TfKDSelf(alpha=0.3, multiplier=10.0)(Outputs(student), Outputs(teacher), batch)
    torch.testing.assert_close(terms["ce"], 0.7 * ce)
    torch.testing.assert_close(terms["tfkd"], 3.0 * tfkd_self_loss(student, teacher))


def test_only_one_of_the_two_wants_a_teacher():
    assert not TfKDReg().needs.teacher
    assert TfKDSelf().needs.teacher


def test_presets_are_the_releases():
    chosen = create_method("tfkd_reg", preset="cifar100/mobilenetv2")
    assert (chosen.alpha, chosen.temperature, chosen.multiplier) == (0.95, 40.0, 1.0)
    chosen = create_method("tfkd_self", preset="cifar100/resnet18")
    assert (chosen.alpha, chosen.temperature, chosen.multiplier) == (0.95, 6.0, 50.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[-900.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = tfkd_reg_loss(student, torch.tensor([0]), temperature=1.0, correct=1.0, reduction="batchmean")
    p = math.e / (1 + math.e)
    by_hand = p * (math.log(p) + 900) + (1 - p) * math.log(1 - p)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-p, p]], dtype=dtype))
