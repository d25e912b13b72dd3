import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.functional import nkd_loss, nkd_others_loss, nkd_target_loss
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.nkd import NKD
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return 3 * torch.randn(batch, classes), 3 * torch.randn(batch, classes), torch.randint(classes, (batch,))


def slowly(student, teacher, labels, temperature):
    target = others = 0.0
    for zs, zt, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        target -= math.exp(zt[y]) / sum(map(math.exp, zt)) * math.log(math.exp(zs[y]) / sum(map(math.exp, zs)))
        p = [math.exp(z / temperature) for k, z in enumerate(zt) if k != y]
        q = [math.exp(z / temperature) for k, z in enumerate(zs) if k != y]
        others -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
    return target / len(labels), temperature**2 * others / len(labels)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_the_formula_computed_slowly(temperature):
    given = made()
    target, others = slowly(*given, temperature)
    assert nkd_target_loss(*given).item() == pytest.approx(target, rel=1e-5)  # at temperature 1 whatever T
    assert nkd_others_loss(*given, temperature=temperature).item() == pytest.approx(others, rel=1e-5)
    whole = nkd_loss(*given, temperature=temperature, gamma=3.5)
    assert whole.item() == pytest.approx(target + 3.5 * others, rel=1e-5)


def test_of_shares_of_classes_the_largest_counts():
    student, teacher, labels = made()
    shares = 0.6 * torch.nn.functional.one_hot(labels, 5) + 0.4 / 5
    torch.testing.assert_close(nkd_loss(student, teacher, shares), nkd_loss(student, teacher, labels))
    method, images = NKD(), torch.zeros(6, 3, 1, 1)
    mixed = method(Outputs(student), Outputs(teacher), Batch(images, (labels + 1) % 5, soft_labels=shares))
    plain = method(Outputs(student), Outputs(teacher), Batch(images, labels))
    for name in ("target", "others"):
        torch.testing.assert_close(mixed[name], plain[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[-900.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = nkd_loss(student, -student.detach(), torch.tensor([0]), gamma=1.0)
    assert loss.item() == pytest.approx(900 + 2 * math.log(2), rel=1e-6)  # 900 + ln 2, and ln 2 of the others
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1.0, 0.5, 0.5]], dtype=dtype))


def test_two_classes_leave_nothing_of_the_others_and_the_method_refuses_them():
    student, teacher, labels = made(classes=2)
    assert nkd_others_loss(student, teacher, labels, temperature=3.0).item() == 0
    side = NetworkInfo(Outputs(student))
    with pytest.raises(UsageError, match=r"nkd .* Use method kd"):
        NKD().build(side, side, TrainingInfo(classes=2))
    with pytest.raises(UsageError, match=r"nkd .* Use method kd"):
        NKD()(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))
