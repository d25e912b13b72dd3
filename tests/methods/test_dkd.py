import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.functional import dkd_loss, kd_loss, nckd_loss, tckd_loss
from potstill.methods import create_method
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.dkd import DKD
from potstill.types import Batch, Outputs


def made(batch=6, classes=5):
    torch.manual_seed(0)
    return 3 * torch.randn(batch, classes), 3 * torch.randn(batch, classes), torch.randint(classes, (batch,))


def slowly(student, teacher, labels, temperature):
    """Both parts by the book, one image at a time."""
    target = others = 0.0
    for zs, zt, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in row] for row in (zt, zs))
        p_y, q_y = p[y] / sum(p), q[y] / sum(q)
        target += p_y * math.log(p_y / q_y) + (1 - p_y) * math.log((1 - p_y) / (1 - q_y))
        del p[y], q[y]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        others += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * target / len(labels), temperature**2 * others / len(labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula_computed_slowly(temperature):
    given = made()
    target, others = slowly(*given, temperature)
    assert tckd_loss(*given, temperature=temperature).item() == pytest.approx(target, rel=1e-5)
    assert nckd_loss(*given, temperature=temperature).item() == pytest.approx(others, rel=1e-5)
    whole = dkd_loss(*given, temperature=temperature, alpha=0.5, beta=3.0)
    assert whole.item() == pytest.approx(0.5 * target + 3 * others, rel=1e-5)


def test_one_image_adds_up_to_hintons_loss_with_beta_one_minus_p():
    student, teacher, labels = made(batch=1)
    p = torch.softmax(teacher / 2, dim=1)[0, labels[0]].item()
    found = dkd_loss(student, teacher, labels, temperature=2.0, alpha=1.0, beta=1 - p)
    torch.testing.assert_close(found, kd_loss(student, teacher, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_at_a_gap_of_900(dtype):
    student = torch.tensor([[900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-900.0, 0.0, 0.0], [900.0, 0.0, 0.0]], dtype=dtype)
    loss = tckd_loss(student, teacher, torch.tensor([0, 0]), temperature=1.0)
    # first image: ln 1 - (ln 2 - 900); second: 0 - (-900 - ln 2)
    assert loss.item() == pytest.approx(900, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(
        student.grad, torch.tensor([[0.5, -0.25, -0.25], [-0.5, 0.25, 0.25]], dtype=dtype), rtol=0, atol=1e-6
    )


def test_two_classes_leave_nothing_of_the_other_part():
    student, teacher, labels = made(classes=2)
    assert nckd_loss(student, teacher, labels, temperature=4.0).item() == 0
    expected = kd_loss(student, teacher, temperature=4.0)
    torch.testing.assert_close(dkd_loss(student, teacher, labels, temperature=4.0), expected)


def test_the_method_refuses_two_classes_before_training_and_in_it():
    student, teacher, labels = made(classes=2)
    side = NetworkInfo(Outputs(student))
    with pytest.raises(UsageError, match="Use method kd"):
        DKD().build(side, side, TrainingInfo(classes=2))
    method = DKD(warmup_epochs=0)
    with pytest.raises(UsageError, match="Use method kd"):
        method(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))


def test_weights_rise_evenly_from_the_first_epoch():
    student, teacher, labels = made()
    target, others = slowly(student, teacher, labels, 4.0)
    method = DKD(alpha=2.0, beta=6.0, warmup_epochs=20)
    for epoch, factor in [(0, 0.05), (9, 0.5), (19, 1.0), (200, 1.0)]:
        method.start_epoch(epoch, 240)
        terms = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))
        assert terms["tckd"].item() == pytest.approx(factor * 2 * target, rel=1e-5)
        assert terms["nckd"].item() == pytest.approx(factor * 6 * others, rel=1e-5)
        assert terms["ce"].item() == pytest.approx(torch.nn.functional.cross_entropy(student, labels).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "epochs", "length"),
    [
        ({}, 240, 20.0),
        ({}, 300, 20.0),
        ({}, 24, 2.0),  # the same share of a shorter training
        ({"warmup_epochs": 20}, 24, 20.0),  # as given
        ({"warmup_epochs": "50%"}, 24, 12.0),
        ({"warmup_epochs": "0%"}, 24, 0.0),
        ({"preset": "imagenet/resnet34-resnet18"}, 10, 1.0),
    ],
)
def test_the_warm_up_is_a_number_of_epochs_or_a_share(given, epochs, length):
    student, teacher, labels = made()
    target, _ = slowly(student, teacher, labels, 4.0)
    method = create_method("dkd", **{"temperature": 4.0, **given})
    assert method.warmup_length(epochs) == length
    assert method.adapted_epochs(epochs) == ({} if length in (20, 1) else {"dkd.warmup_epochs": length})
    method.start_epoch(0, epochs)
    terms = method(Outputs(student), Outputs(teacher), Batch(torch.zeros(6, 3, 1, 1), labels))
    assert terms["tckd"].item() == pytest.approx(target / max(length, 1), rel=1e-5)


def test_presets_are_the_papers():
    beta = {name: create_method("dkd", preset=name).beta for name in DKD.PRESETS}
    assert beta["cifar100/resnet56-resnet20"] == 2
    assert beta["cifar100/vgg13-vgg8"] == 6
    assert beta["cifar100/resnet32x4-resnet8x4"] == 8
    imagenet = create_method("dkd", preset="imagenet/resnet34-resnet18")
    assert (imagenet.temperature, imagenet.alpha, imagenet.beta, imagenet.warmup_epochs) == (1, 1, 0.5, 1)
    assert create_method("dkd", preset="imagenet/resnet34-resnet18", beta=3.0).beta == 3
