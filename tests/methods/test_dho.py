import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.features.student_surgery import DualHead, rebuild_student
from potstill.functional import dho_loss, kd_loss
from potstill.methods import create_method
from potstill.methods.dho import DHO

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, -100, -100, -100])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3))


def distiller(**options):
    return Distiller(network(), network(1), DHO(**options), example=IMAGES)


def test_loss_by_hand():
    sure, flat = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher, labels = torch.cat([sure, sure, flat, flat]), torch.tensor([0, -100, -100, -100])
    found = dho_loss(torch.zeros(4, 2), teacher, labels, temperature=1.0)
    assert found.item() == pytest.approx(kl + kl / 3, rel=1e-6)  # a mean of one, and one of three
    weighted = dho_loss(torch.zeros(4, 2), teacher, labels, temperature=1.0, confidence="top")
    assert weighted.item() == pytest.approx(kl + 0.75 * kl / 3, rel=1e-6)  # the label's image counts in full


def test_labeled_images_alone_give_hintons_loss():
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    found = dho_loss(ours, theirs, torch.tensor([0, 1, 2, 0]), temperature=2.0)
    torch.testing.assert_close(found, kd_loss(ours, theirs, temperature=2.0))


def test_each_head_has_a_teacher_of_its_own():
    made = distiller(balance=0.3)
    dual = made.student
    assert isinstance(dual, DualHead)
    step = made(IMAGES, LABELS)
    embedding = dual.network[:3](IMAGES)
    first, second = dual.heads.first(embedding), dual.heads.second(embedding)
    torch.testing.assert_close(step.terms["ce"], 0.3 * F.cross_entropy(first[:3], LABELS[:3]))
    theirs = network(1)(IMAGES)
    by_hand = sum(kd_loss(second[rows], theirs[rows], temperature=2.0) for rows in (slice(3), slice(3, 6)))
    torch.testing.assert_close(step.terms["dho"], 0.7 * by_hand)
    weights = [dual.heads.first.weight, dual.heads.second.weight, dual.network[1].weight]
    moved = {
        name: [g is not None for g in torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)]
        for name, term in step.terms.items()
    }
    assert moved == {"ce": [True, False, True], "dho": [False, True, True]}
    averaged = 0.5 * first.softmax(dim=1) + 0.5 * second.softmax(dim=1)
    torch.testing.assert_close(step.logits.softmax(dim=1), averaged)


def test_the_better_average_on_val_is_chosen():
    first = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.1]])
    second = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    dual = distiller().student
    logits = dual.select(first, second, torch.tensor([1, 0, 1]))  # only the second head knows the first image
    assert logits.argmax(dim=1).tolist() == [1, 0, 1]
    assert dual.heads.alpha < 0.5
    assert (dual.facts["alpha"], dual.facts["beta"]) == (dual.heads.alpha, dual.heads.beta)
    dual.select(second, first, torch.tensor([1, 0, 1]))
    assert dual.heads.alpha > 0.5
    fixed = distiller(alpha=0.25, beta=2.0).student
    fixed.select(first, second, torch.tensor([1, 0, 1]))
    assert (fixed.heads.alpha, fixed.heads.beta) == (0.25, 2.0)


def test_the_deployed_network_is_built_again_from_its_facts():
    made = distiller(alpha=0.2, beta=1.5).student.eval()
    again = rebuild_student(network(5), made.facts).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(IMAGES), made(IMAGES))
    with pytest.raises(UsageError, match="alpha in"):
        rebuild_student(network(), {"name": "dual_head", "head": "3", "alpha": 2.0, "beta": 1.0})


def test_certain_heads_put_out_finite_logits():
    dual = distiller(alpha=1.0).student
    with torch.no_grad():
        dual.heads.first.weight.mul_(1e5)
    assert dual(IMAGES).isfinite().all()


def test_what_it_cannot_do_is_refused():
    convolutional = nn.Sequential(nn.Conv2d(3, 3, 4), nn.Flatten())
    with pytest.raises(UsageError, match="last linear layer"):
        Distiller(convolutional, network(1), DHO(), example=IMAGES)
    changed = distiller().student
    with pytest.raises(UsageError, match=r"last linear layer|changed already"):
        Distiller(changed, network(1), DHO(), example=IMAGES)
    for around in (
        {"name": "ls", "base_method": {"name": "dho"}},
        {"name": "combined", "methods": [{"name": "dho"}] * 2},
    ):
        with pytest.raises(UsageError, match="dho"):
            create_method(**around)
    with pytest.raises(UsageError, match="confidence"):
        create_method("ls", base_method={"name": "kd", "alpha": 0.0, "confidence": "top"})


def test_a_schedule_reaches_it():
    method = create_method("dho", schedule={"temperature": {"start": 1.0, "end": 4.0, "shape": "linear"}})
    made = Distiller(network(), network(1), method, example=IMAGES)
    made.start_epoch(0, 2)
    first = made(IMAGES, LABELS).terms["dho"]
    embedding = made.student.network[:3](IMAGES)
    by_hand = 0.5 * dho_loss(made.student.heads.second(embedding), network(1)(IMAGES), LABELS, temperature=1.0)
    torch.testing.assert_close(first, by_hand)
