import math

import pytest
import torch
from made_outputs import made_batch, made_outputs, side

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import camkd_feature_loss, camkd_logit_loss, camkd_weights
from potstill.methods.base import TrainingInfo
from potstill.methods.camkd import CAMKD
from potstill.types import Outputs


def teachers(count, **options):
    members = tuple(made_outputs(seed=number + 1, width=6 + number, grad=False, **options) for number in range(count))
    logits = torch.stack([member.logits for member in members]).mean(dim=0)
    return Outputs(logits, members=members)


def built(count=3, size=4, **options):
    student, teacher = made_outputs(), teachers(count, size=size)
    student.members = (student,) * count
    method = CAMKD(**options)
    method.build(side(student), side(teacher), TrainingInfo(3))
    return method, student, teacher


def test_weights_and_logit_term_against_loops():
    student, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor([2, 0])
    given = [torch.randn(2, 3, dtype=torch.float64) for _ in range(3)]
    total = 0.0
    for i in range(2):
        losses = [-torch.log_softmax(one[i], dim=0)[labels[i]].item() for one in given]
        shares = [math.exp(loss) / sum(map(math.exp, losses)) for loss in losses]
        for m, one in enumerate(given):
            p, q = torch.softmax(one[i] / 4, dim=0), torch.softmax(student[i] / 4, dim=0)
            total += (1 - shares[m]) / 2 * 16 * (p * (p / q).log()).sum().item()
            assert camkd_weights(given, labels)[m, i].item() == pytest.approx((1 - shares[m]) / 2)
    assert camkd_logit_loss(student, given, labels).item() == pytest.approx(total / 6, rel=1e-10)


def test_the_teacher_that_is_wrong_counts_least_and_extremes_stay_finite():
    right, wrong = torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])
    assert camkd_weights([right, wrong], torch.tensor([0])).flatten().tolist() == [1, 0]
    assert camkd_logit_loss(torch.zeros(1, 2), [right, wrong], torch.tensor([0])).isfinite()


def test_weights_of_the_feature_term_carry_gradient():
    heads = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    maps = [torch.randn(2, 4, 2, 2) for _ in range(2)]
    camkd_feature_loss(maps, [0 * one for one in maps], heads, torch.tensor([0, 1])).backward()
    assert all(head.grad.norm() > 0 for head in heads)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_terms_and_projectors(size):
    method, student, teacher = built(size=size)
    method.start_epoch(1, 10)
    terms = method(student, teacher, made_batch())
    assert terms.keys() == {"ce", "kd", "feature"}
    terms["feature"].backward()
    for projector in method.projectors:
        assert projector.conv.weight.grad.norm() > 0
    assert student.maps[0].grad.norm() > 0


def test_first_epoch_has_no_feature_term():
    method, student, teacher = built()
    method.start_epoch(0, 10)
    assert method.distill(student, teacher, made_batch())["feature"].item() == 0
    method.start_epoch(1, 10)
    assert method.distill(student, teacher, made_batch())["feature"].item() > 0


def test_without_the_feature_term_only_logits_are_read():
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)) for _ in range(3)]
    distiller = Distiller(networks[0], networks[1:], CAMKD(feature_weight=0))
    batch = made_batch()
    step = distiller(torch.randn(6, 3, 2, 2), batch.labels)
    assert step.terms.keys() == {"ce", "kd"}
    assert CAMKD().needs.features


def test_refuses_a_single_teacher():
    with pytest.raises(UsageError, match="needs 2 or more, got 1"):
        built(count=1)
    with pytest.raises(UsageError, match="needs 2 or more, got 1"):
        camkd_weights([torch.zeros(1, 2)], torch.tensor([0]))
