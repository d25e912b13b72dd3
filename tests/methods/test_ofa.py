import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.distillation.distiller import Distiller
from potstill.functional import ofa_loss
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.ofa import OFA
from potstill.types import Batch, Outputs

LABELS = torch.arange(6) % 5


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(6, 5, generator=generator) for _ in range(2))


def slowly(student, teacher, epsilon, temperature, *, all_classes):
    total = 0.0
    for zs, zt, y in zip(student, teacher, LABELS.tolist(), strict=True):
        p, q = ((z / temperature).softmax(0).tolist() for z in (zt, zs))
        for k in range(5):
            if k == y:
                weight = (1 + p[k]) ** epsilon - 1
            else:
                weight = p[k] ** epsilon if all_classes else p[k]
            total -= weight * math.log(q[k])
    return total / 6


@pytest.mark.parametrize("form", ["release", "paper"])
@pytest.mark.parametrize(("epsilon", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.2, 4.0)])
def test_equals_the_formula_computed_slowly(form, epsilon, temperature):
    student, teacher = made()
    slow = slowly(student, teacher, epsilon, temperature, all_classes=form == "release")
    found = ofa_loss(student, teacher, LABELS, epsilon=epsilon, temperature=temperature, form=form)
    assert found.item() == pytest.approx(slow, rel=1e-5)


def test_epsilon_one_is_soft_cross_entropy():
    student, teacher = made()
    torch.testing.assert_close(ofa_loss(student, teacher, LABELS), F.cross_entropy(student, teacher.softmax(1)))


def test_is_finite_at_a_gap_of_900():
    student = torch.tensor([[900.0, 0.0, 0.0]], requires_grad=True)
    loss = ofa_loss(student, torch.tensor([[0.0, 0.0, 900.0]]), torch.tensor([1]), epsilon=1.2)
    assert loss.item() == pytest.approx(900)  # the target is class 2 alone, whose log-probability is -900
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, 0.0, -1.0]]))


def ready(**options):
    torch.manual_seed(0)
    maps = tuple(torch.randn(6, width, size, size, requires_grad=True) for width, size in ((3, 8), (4, 4), (7, 2)))
    student, teacher = Outputs(made()[0].requires_grad_(True), maps=maps), Outputs(made()[1].requires_grad_(True))
    method = OFA(**options)
    method.build(NetworkInfo(student), NetworkInfo(teacher), TrainingInfo(classes=5))
    return method, student, teacher


def test_every_stage_has_a_head_that_halves_the_map_for_each_stage_behind_it():
    method, student, _ = ready()
    kinds = [[type(layer).__name__ for layer in head] for head in method.heads]
    end = ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert kinds == [["Sequential", "Sequential", *end], ["Sequential", *end], end]
    assert method.heads[0][:2](student.maps[0]).shape == (6, 7, 2, 2)
    assert method.heads[0][0][0].groups == 3  # depthwise
    torch.testing.assert_close(method.heads[2](student.maps[2]), method.heads[2][2](student.maps[2].mean(dim=(2, 3))))


@pytest.mark.parametrize("form", ["release", "paper"])
def test_stages_and_logits_are_told_alike(form):
    method, student, teacher = ready(weight=2.0, stage_weight=3.0, epsilon=1.5, form=form)
    terms = method(student, teacher, Batch(torch.zeros(6, 3, 1, 1), LABELS))
    said = [head(each) for head, each in zip(method.heads, student.maps, strict=True)]
    told = [slowly(each.detach(), teacher.logits, 1.5, 1.0, all_classes=form == "release") for each in said]
    if form == "paper":  # whose formula holds the label too
        told += [F.cross_entropy(each, LABELS).item() for each in said]
    assert terms["stages"].item() == pytest.approx(3 * sum(told), rel=1e-5)
    own = slowly(student.logits.detach(), teacher.logits, 1.5, 1.0, all_classes=form == "release")
    assert terms["ofa"].item() == pytest.approx(2 * own, rel=1e-5)
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(student.logits, LABELS).item(), rel=1e-6)
    (terms["stages"] + terms["ofa"]).backward()
    assert teacher.logits.grad is None
    assert all(each.grad.abs().sum() > 0 for each in student.maps)


def test_heads_are_no_part_of_the_student():
    def block(inputs, width):
        return nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())

    student = nn.Sequential(block(3, 4), block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    teacher = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    before = set(student.state_dict())
    images = torch.randn(6, 3, 16, 16)
    distiller = Distiller(student, teacher, OFA(), example=images)
    distiller(images, LABELS).loss.backward()
    assert set(student.state_dict()) == before
    assert len(distiller.method.heads) == 2
    assert all(p.grad.abs().sum() > 0 for name, p in distiller.method.named_parameters() if "norm" not in name)
