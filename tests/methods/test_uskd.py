import math

import pytest
import torch
from torch.nn import functional as F

from potstill.errors import UsageError
from potstill.functional import uskd_others_loss, uskd_target_loss, uskd_weak_loss
from potstill.methods import create_method
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.uskd import USKD
from potstill.types import Batch, Outputs


def made(images=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, weak = (2 * torch.randn(images, classes, generator=generator) for _ in range(2))
    return student, weak, torch.arange(images) % classes


def slow_others(student, weak, labels, *, logarithms):
    total = 0.0
    for zs, zw, y in zip(student, weak, labels.tolist(), strict=True):
        p, w = zs.softmax(0).tolist(), zw.softmax(0).tolist()
        own = [math.log(each) for each in p] if logarithms else p
        others = [k for k in range(len(p)) if k != y]
        score = {k: w[k] / (1 - w[y] + 1e-6) + own[k] / (1 - own[y] + 1e-6) for k in others}
        order = sorted(others, key=lambda k: -score[k])
        law = sum(1 / (rank + 1) for rank in range(len(order)))
        rest = sum(p[k] for k in others)
        total -= sum(1 / (rank + 1) / law * math.log(p[k] / rest) for rank, k in enumerate(order))
    return total / len(labels)


@pytest.mark.parametrize("form", ["paper", "release"])
def test_others_follow_zipfs_law_of_their_rank(form):
    given = made()
    slow = slow_others(*given, logarithms=form == "release")
    assert uskd_others_loss(*given, form=form).item() == pytest.approx(slow, rel=1e-5)


def test_the_release_ranks_differently():
    student, weak = torch.tensor([[0.02, 0.08, 0.9]]).log(), torch.tensor([[0.475, 0.025, 0.5]]).log()
    label = torch.tensor([2])
    # Shares of the others: 0.2 + 0.95 against 0.8 + 0.05, so class 0 comes first.  Logarithms, over 1 - ln 0.9:
    # -3.539 + 0.95 against -2.285 + 0.05, so class 1 does.
    first, second = 2 / 3 * math.log(0.2) + 1 / 3 * math.log(0.8), 1 / 3 * math.log(0.2) + 2 / 3 * math.log(0.8)
    assert uskd_others_loss(student, weak, label).item() == pytest.approx(-first, rel=1e-5)
    assert uskd_others_loss(student, weak, label, form="release").item() == pytest.approx(-second, rel=1e-5)


def test_target_weights_have_mean_one_and_no_gradient():
    student, _, labels = made()
    q = student.softmax(1).gather(1, labels[:, None]).squeeze(1).tolist()
    mean = sum(each**2 for each in q) / len(q)
    weights = [each**2 + 1 - mean for each in q]
    slow = -sum(w * math.log(each) for w, each in zip(weights, q, strict=True)) / len(q)
    student.requires_grad_(True)
    loss = uskd_target_loss(student, labels)
    assert loss.item() == pytest.approx(slow, rel=1e-5)
    loss.backward()
    with torch.no_grad():
        constant = torch.tensor(weights)[:, None] * (student.softmax(1) - F.one_hot(labels, 5)) / len(q)
    torch.testing.assert_close(student.grad, constant, rtol=1e-4, atol=1e-6)


def test_weak_labels_are_smoothed_by_a_tenth():
    _, weak, labels = made()
    target = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    slow = -(target * weak.log_softmax(1)).sum().item() / len(labels)
    assert uskd_weak_loss(weak, labels).item() == pytest.approx(slow, rel=1e-6)


def test_is_finite_at_a_gap_of_900():
    student = torch.tensor([[900.0, 0.0, -900.0], [-900.0, 0.0, 900.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    for form in ("paper", "release"):
        loss = uskd_others_loss(student, -student.detach(), labels, form=form) + uskd_target_loss(student, labels)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def outputs(classes=5):
    torch.manual_seed(0)
    maps = tuple(torch.randn(6, width, size, size, requires_grad=True) for width, size in ((3, 8), (4, 4), (7, 2)))
    return Outputs(torch.randn(6, classes, requires_grad=True), maps=maps)


def test_the_weak_head_reads_the_last_but_one_stage():
    student, labels = outputs(), torch.arange(6) % 5
    method = USKD(alpha=2.0, beta=3.0, mu=0.5)
    method.build(NetworkInfo(student), None, TrainingInfo(classes=5))
    weak = method.weak_head(student.maps[1].mean(dim=(2, 3)))
    terms = method(student, None, Batch(torch.zeros(6, 3, 1, 1), labels))
    torch.testing.assert_close(terms["target"], 2 * uskd_target_loss(student.logits, labels))
    torch.testing.assert_close(terms["others"], 3 * uskd_others_loss(student.logits, weak, labels))
    torch.testing.assert_close(terms["weak"], 0.5 * uskd_weak_loss(weak, labels))
    (gradient,) = torch.autograd.grad(terms["weak"], student.maps[1], retain_graph=True)
    assert gradient.abs().sum() > 0
    # the ranking hands nothing to the weak head
    assert torch.autograd.grad(terms["others"], student.maps[1], allow_unused=True) == (None,)


def test_two_classes_are_refused_and_presets_are_the_authors():
    student = outputs(classes=2)
    with pytest.raises(UsageError, match="Use method kd"):
        USKD().build(NetworkInfo(student), None, TrainingInfo(classes=2))
    cifar, imagenet = (create_method("uskd", preset=name) for name in ("cifar100", "imagenet"))
    assert (cifar.alpha, cifar.beta, cifar.mu) == (0.1, 0.1, 0.1)
    assert (imagenet.alpha, imagenet.beta, imagenet.mu) == (1.0, 0.1, 0.005)
