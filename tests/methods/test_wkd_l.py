import math

import pytest
import torch
from made_outputs import made_outputs, side
from torch.nn import functional as F

from potstill.errors import UsageError
from potstill.functional import wkd_cost, wkd_distance_loss, wkd_target_loss
from potstill.methods import create_method
from potstill.methods.base import TrainingInfo
from potstill.methods.wkd_l import WKDL
from potstill.types import Batch

B, K = 4, 5


def made(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(B, K, generator=generator, dtype=dtype) for _ in range(2))
    cost = wkd_cost(torch.randn(K, 7, generator=generator, dtype=dtype), sharpness=1.0)
    return student, teacher, torch.tensor([0, 4, 2, 2]), cost


def transport(student, teacher, labels, cost, temperature, regularization=0.05, steps=10):
    """Sinkhorn's iteration on what is left when row and column of the label are taken out; plans and costs."""
    plans = []
    for zs, zt, y in zip(student, teacher, labels.tolist(), strict=True):
        keep = [k for k in range(K) if k != y]
        a, b = ((z[keep] / temperature).softmax(dim=0) for z in (zs, zt))
        c = cost[keep][:, keep].clamp(min=0) + 1e-8
        kernel = torch.exp(-c / regularization)
        u = torch.full_like(a, 1 / (K - 1))
        for _ in range(steps):
            v = b / (kernel.T @ u + 1e-8)
            u = a / (kernel @ v + 1e-8)
        plans.append((u[:, None] * kernel * v[None], c, a, b))
    return plans


def test_equals_sinkhorn_on_the_other_classes_alone():
    student, teacher, labels, cost = made()
    slow = sum((plan * c).sum() for plan, c, _, _ in transport(student, teacher, labels, cost, 2.0)) / B
    torch.testing.assert_close(wkd_distance_loss(student, teacher, labels, cost, temperature=2.0), slow)


def test_gradient_runs_through_the_iteration():
    student, teacher, labels, cost = made()
    student.requires_grad_(True)
    wkd_distance_loss(student, teacher, labels, cost, temperature=2.0).backward()
    step = 1e-6
    for image, which in [(0, 1), (1, 3), (3, 0), (2, 2)]:
        moved = student.detach().clone()
        moved[image, which] += step
        up = wkd_distance_loss(moved, teacher, labels, cost, temperature=2.0).item()
        moved[image, which] -= 2 * step
        down = wkd_distance_loss(moved, teacher, labels, cost, temperature=2.0).item()
        assert student.grad[image, which].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-9)
    assert student.grad[2, 2] == 0  # the labelled class has no part in it


def test_near_classes_cost_less_than_far_ones():
    logits, cost = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.ones(4, 4) - torch.eye(4)
    cost[1, 2] = cost[2, 1] = 0.1
    near, far = torch.tensor([[0.0, 0.0, 9.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 9.0]])
    label = torch.tensor([0])
    found = [wkd_distance_loss(logits, each, label, cost, temperature=1.0).item() for each in (logits, near, far)]
    assert found[0] == pytest.approx(0.0, abs=1e-3)
    assert found[1] == pytest.approx(0.1, rel=0.01)
    assert found[2] == pytest.approx(1.0, rel=0.01)


def test_cost_is_the_sharpened_cosine_distance():
    rows = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    found = wkd_cost(rows, sharpness=2.0)
    assert found[0, 1].item() == pytest.approx(1 - math.exp(-2 * (1 - math.sqrt(0.5))), rel=1e-5)
    assert found[0, 2].item() == pytest.approx(1 - math.exp(-4), rel=1e-5)
    assert wkd_cost(rows, sharpness=0.0)[0, 2].item() == pytest.approx(2.0)


def test_target_is_a_cross_entropy_weighted_by_the_teacher():
    student, teacher, labels, _ = made()
    slow = -sum(
        teacher[i].softmax(0)[y].item() * student[i].log_softmax(0)[y].item() for i, y in enumerate(labels.tolist())
    )
    assert wkd_target_loss(student, teacher, labels).item() == pytest.approx(slow / B, rel=1e-9)


def test_autocast_does_not_lower_the_precision_and_a_gap_of_900_stays_finite():
    student, teacher, labels, cost = made(torch.float32)
    plain = wkd_distance_loss(student, teacher, labels, cost)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = wkd_distance_loss(student, teacher, labels, cost)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    far = torch.zeros(B, K)
    far[:, 1] = 900.0
    far.requires_grad_(True)
    loss = wkd_distance_loss(far, -far.detach(), labels, cost, temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert far.grad.isfinite().all()


def ready(method, epoch=0, classes=3):
    outputs = made_outputs(classes=classes, seed=1, grad=False)
    method.build(side(made_outputs(classes=classes)), side(outputs), TrainingInfo(classes=classes))
    method.start_epoch(epoch, 240)
    return method, outputs


def test_method_reads_the_teachers_head_and_weighs_both_terms():
    method, teacher = ready(WKDL(weight=0.5, gamma=20.0, temperature=2.0, sharpness=1.5))
    student, batch = made_outputs(), Batch(torch.zeros(6, 3, 1, 1), torch.arange(6) % 3)
    units = F.normalize(teacher.head.weight, dim=1)
    cost = 1 - torch.exp(-1.5 * (1 - units @ units.T))
    torch.testing.assert_close(method.cost, cost)
    terms = method(student, teacher, batch)
    given = (student.logits, teacher.logits, batch.labels)
    torch.testing.assert_close(terms["transport"], 20 * wkd_distance_loss(*given, cost, temperature=2.0))
    torch.testing.assert_close(terms["target"], 0.5 * wkd_target_loss(*given))
    assert "cost" in method.state_dict()


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (150, 1.0), (195, 0.5), (180, 0.75), (300, 0.0)])
def test_the_transport_fades_as_a_half_cosine(epoch, factor):
    method, _ = ready(create_method("wkd_l", preset="cifar100/resnet32x4-resnet8x4"), epoch)
    assert method.fading == pytest.approx(factor)
    assert ready(WKDL(), epoch)[0].fading == 1.0


def test_two_classes_are_refused():
    with pytest.raises(UsageError, match="Use method kd"):
        ready(WKDL(), classes=2)
