import math

import pytest
import torch
from torch.nn import functional as F

from potstill.functional import crld_cross_loss, crld_within_loss
from potstill.methods import create_method
from potstill.methods.crld import CRLD
from potstill.types import Batch, Outputs

FLAT, SURE = [0.0, 0.0], [math.log(3.0), 0.0]  # (1/2, 1/2) and (3/4, 1/4)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def rows(*values):
    return torch.tensor(values)


def test_the_usual_views_confidence_decides_within_views():
    # Images: sure in the usual view; sure in the strong view; in neither.  The student is flat everywhere.
    flat = rows(FLAT, FLAT, FLAT)
    weak, strong = rows(SURE, FLAT, FLAT), rows(FLAT, SURE, FLAT)
    given = (flat, flat, weak, strong)
    within = crld_within_loss(*given, temperature=1.0, threshold=0.6)
    assert within.item() == pytest.approx(KL / 3, rel=1e-6)  # those left out count in the mean
    across = crld_cross_loss(*given, temperature=1.0, threshold=0.6)
    assert across.item() == pytest.approx(KL / 3, rel=1e-6)
    assert crld_within_loss(*given, temperature=1.0, threshold=0.76).item() == 0
    assert crld_within_loss(*given, temperature=1.0, threshold=0.0).item() == pytest.approx(2 * KL / 3, rel=1e-6)


def test_across_views_the_strong_student_hears_of_the_usual_view():
    flat, sure = rows(FLAT), rows(SURE)
    # The strong student says (3/4, 1/4) as the teacher of the usual view does; the usual one is flat as the other.
    assert crld_cross_loss(flat, sure, sure, flat, temperature=1.0, threshold=0.0).item() == 0
    assert crld_within_loss(flat, sure, sure, flat, temperature=1.0, threshold=0.0).item() > KL


def test_confidence_is_taken_at_temperature_one():
    flat, sure = rows(FLAT), rows(SURE)
    found = crld_within_loss(flat, flat, sure, flat, temperature=4.0, threshold=0.7)
    p = 3**0.25 / (3**0.25 + 1)
    assert found.item() == pytest.approx(16 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), rel=1e-4)


def test_method_weighs_views_and_labels():
    generator = torch.Generator().manual_seed(0)
    weak_s, strong_s, weak_t, strong_t = (3 * torch.randn(8, 4, generator=generator) for _ in range(4))
    labels = torch.arange(8) % 4
    student = Outputs(weak_s.requires_grad_(True), second=Outputs(strong_s.requires_grad_(True)))
    teacher = Outputs(weak_t.requires_grad_(True), second=Outputs(strong_t))
    method = CRLD(within_weight=3.0, cross_weight=0.25, ce_weight=2.0, weak_threshold=0.7, strong_threshold=0.5)
    terms = method(student, teacher, Batch(torch.zeros(8, 3, 1, 1), labels))
    given = (weak_s, strong_s, weak_t, strong_t)
    torch.testing.assert_close(terms["within"], 3 * crld_within_loss(*given, temperature=4.0, threshold=0.7))
    torch.testing.assert_close(terms["across"], 0.25 * crld_cross_loss(*given, temperature=4.0, threshold=0.5))
    torch.testing.assert_close(terms["ce"], 2 * F.cross_entropy(weak_s, labels))
    torch.testing.assert_close(terms["ce_strong"], 2 * F.cross_entropy(strong_s, labels))
    assert method.label_term_names == {"ce", "ce_strong"}
    (terms["within"] + terms["across"]).backward()
    assert weak_s.grad.abs().sum() > 0
    assert strong_s.grad.abs().sum() > 0
    assert weak_t.grad is None


def test_presets_are_the_authors():
    cifar, imagenet = (create_method("crld", preset=name) for name in ("cifar100", "imagenet"))
    assert (cifar.temperature, cifar.weak_threshold, cifar.strong_threshold) == (4.0, 0.9, 0.2)
    assert (cifar.within_weight, cifar.cross_weight, cifar.ce_weight) == (2.0, 0.5, 1.0)
    assert (imagenet.temperature, imagenet.ce_weight) == (1.0, 2.0)
