import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import deit_hard_loss, deit_soft_loss, kd_loss
from potstill.methods.deit import DeiTHard, DeiTSoft
from potstill.types import Batch, Outputs

IMAGES = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


class TwoHeads(nn.Module):
    """As a transformer with a distillation token: each head reads its own embedding, the logits are the mean."""

    def __init__(self, classes_dist=3):
        super().__init__()
        self.body, self.head, self.head_dist = nn.Linear(12, 8), nn.Linear(4, 3), nn.Linear(4, classes_dist)

    def forward(self, images):
        own, other = self.body(images.flatten(1)).chunk(2, dim=1)
        return (self.head(own) + self.head_dist(other)[:, :3]) / 2


def said(student):
    own, other = student.body(IMAGES.flatten(1)).chunk(2, dim=1)
    return student.head(own), student.head_dist(other)


def teacher():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def test_hard_takes_the_teachers_first_class_for_a_label():
    student, network = TwoHeads(), teacher()
    terms = Distiller(student, network, DeiTHard(alpha=0.3), example=IMAGES)(IMAGES, LABELS).terms
    head, head_dist = said(student)
    torch.testing.assert_close(terms["ce"], 0.7 * F.cross_entropy(head, LABELS))
    torch.testing.assert_close(terms["hard"], 0.3 * F.cross_entropy(head_dist, network(IMAGES).argmax(1)))


@pytest.mark.parametrize(("reduction", "share"), [("batchmean", 1.0), ("mean", 1 / 3)])
def test_soft_is_hintons_loss_on_the_other_head(reduction, share):
    student, network = TwoHeads(), teacher()
    method = DeiTSoft(alpha=0.3, temperature=2.0, reduction=reduction)
    terms = Distiller(student, network, method, example=IMAGES)(IMAGES, LABELS).terms
    head, head_dist = said(student)
    torch.testing.assert_close(terms["ce"], 0.7 * F.cross_entropy(head, LABELS))
    torch.testing.assert_close(terms["soft"], 0.3 * share * kd_loss(head_dist, network(IMAGES), temperature=2.0))


def test_defaults_are_the_papers():
    assert DeiTHard().alpha == 0.5
    assert (DeiTSoft().alpha, DeiTSoft().temperature, DeiTSoft().reduction) == (0.1, 3.0, "batchmean")


def test_losses_by_hand():
    student, taught = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert deit_hard_loss(student, taught).item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)
    flat, sure = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert deit_soft_loss(flat, sure, temperature=1.0).item() == pytest.approx(kl, rel=1e-6)
    assert deit_soft_loss(flat, sure, temperature=1.0, reduction="mean").item() == pytest.approx(kl / 2, rel=1e-6)


def test_each_term_moves_its_own_head_alone():
    student = TwoHeads()
    step = Distiller(student, teacher(), DeiTHard(), example=IMAGES)(IMAGES, LABELS)
    heads = [student.head.weight, student.head_dist.weight]
    found = {
        name: torch.autograd.grad(step.terms[name], heads, retain_graph=True, allow_unused=True)
        for name in ("ce", "hard")
    }
    assert [gradient is None for gradient in found["ce"]] == [False, True]
    assert [gradient is None for gradient in found["hard"]] == [True, False]


def test_mixed_images_keep_their_shares():
    shares = torch.tensor([[0.5, 0.5, 0.0]]).repeat(4, 1)
    logits = torch.log(torch.tensor([[3.0, 1.0, 4.0]])).repeat(4, 1)
    student = Outputs(logits, {"head": logits, "head_dist": logits})
    batch = Batch(IMAGES, LABELS, soft_labels=shares)
    found = DeiTHard(alpha=0.5).label_terms(student, batch)["ce"]
    assert found.item() == pytest.approx(-0.5 * (0.5 * math.log(3 / 8) + 0.5 * math.log(1 / 8)), rel=1e-6)


def test_students_without_the_two_heads_are_refused():
    with pytest.raises(UsageError, match="has no head and no head_dist; kd works"):
        Distiller(teacher(), teacher(), DeiTHard(), example=IMAGES)
    distiller = Distiller(TwoHeads(classes_dist=4), teacher(), DeiTSoft(), example=IMAGES)
    with pytest.raises(UsageError, match=r"'head_dist' must put out logits \[4, 3\], got \[4, 4\]"):
        distiller(IMAGES, LABELS)
