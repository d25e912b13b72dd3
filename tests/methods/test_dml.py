import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import dml_loss
from potstill.methods.dml import DML

IMAGES = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


def kl(teacher, student, temperature=1.0):
    p, q = ((each.detach() / temperature).log_softmax(1) for each in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum().item() / len(student)


def network():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.0), nn.Linear(12, 3))


def made(**options):
    torch.manual_seed(0)
    return Distiller(network(), None, DML(**options), example=IMAGES)


def test_loss_is_the_mean_over_the_others():
    generator = torch.Generator().manual_seed(0)
    student, first, second = (3 * torch.randn(4, 3, generator=generator) for _ in range(3))
    slow = (kl(first, student, 3.0) + kl(second, student, 3.0)) / 2
    assert dml_loss(student, [first, second], temperature=3.0).item() == pytest.approx(slow, rel=1e-5)
    with pytest.raises(UsageError, match="others"):
        dml_loss(student, [])


def test_every_student_learns_from_labels_and_from_all_others():
    distiller = made(peers=2, weight=0.5, ce_weight=2.0, temperature=3.0)
    terms = distiller(IMAGES, LABELS).terms
    one, two, three = (each(IMAGES) for each in (distiller.student, *distiller.method.others))
    assert terms["ce"].item() == pytest.approx(2 * F.cross_entropy(one, LABELS).item(), rel=1e-5)
    labels = F.cross_entropy(two, LABELS).item() + F.cross_entropy(three, LABELS).item()
    assert terms["peers_ce"].item() == pytest.approx(2 * labels, rel=1e-5)
    assert terms["mimic"].item() == pytest.approx(0.5 * (kl(two, one, 3) + kl(three, one, 3)) / 2, rel=1e-4)
    mimic = (kl(one, two, 3) + kl(three, two, 3) + kl(one, three, 3) + kl(two, three, 3)) / 2
    assert terms["peers_mimic"].item() == pytest.approx(0.5 * mimic, rel=1e-4)
    assert distiller.method.label_term_names == {"ce", "peers_ce"}


def test_what_one_is_told_moves_nobody_else():
    distiller = made(peers=2)
    step = distiller(IMAGES, LABELS)
    peers = [p for p in distiller.method.parameters() if p.requires_grad]
    own = [p for p in distiller.student.parameters() if p.requires_grad]
    assert len(peers) == 2 * len(own)
    for name, theirs, others in (("mimic", own, peers), ("peers_mimic", peers, own)):
        assert all(
            g is None for g in torch.autograd.grad(step.terms[name], others, retain_graph=True, allow_unused=True)
        )
        assert all(g is not None for g in torch.autograd.grad(step.terms[name], theirs, retain_graph=True))


def test_peers_start_untrained_and_unlike_each_other_and_are_saved():
    torch.manual_seed(0)
    student = network()
    with torch.no_grad():
        student[3].weight.fill_(7.0)  # as after training
    distiller = Distiller(student, None, DML(peers=2), example=IMAGES)
    first, second = (each[3].weight for each in distiller.method.others)
    assert first.abs().max() < 1
    assert second.abs().max() < 1
    assert not torch.equal(first, second)
    assert (student[3].weight == 7).all()
    assert "method.others.1.3.weight" in distiller.state_dict()
    assert all(each.training for each in distiller.method.others)
    assert not any(each.training for each in distiller.eval().method.others)


def test_evaluation_asks_the_student_alone():
    distiller = made().eval()
    asked = []
    distiller.method.others[0].register_forward_hook(lambda *_: asked.append(1))
    assert list(distiller(IMAGES, LABELS).terms) == ["ce"]
    assert asked == []
