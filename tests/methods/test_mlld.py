import pytest
import torch
from torch.nn import functional as F

from potstill.functional import kd_loss, mlld_batch_loss, mlld_class_loss, standardise
from potstill.methods import create_method
from potstill.methods.mlld import MLLD
from potstill.types import Batch, Outputs

B, K = 5, 3  # odd, so that "up to the median" is more than half


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weak_s, strong_s, weak_t, strong_t = (3 * torch.randn(B, K, generator=generator) for _ in range(4))
    student = Outputs(weak_s.requires_grad_(True), second=Outputs(strong_s.requires_grad_(True)))
    teacher = Outputs(weak_t, second=Outputs(strong_t))
    return student, teacher, Batch(torch.zeros(B, 3, 1, 1), torch.tensor([0, 1, 2, 0, 1]))


def gram_distance(student, teacher):
    """Sum of squared differences of all inner products of rows, by loops."""
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            ours = sum(float(a) * float(b) for a, b in zip(student[i], student[j], strict=True))
            theirs = sum(float(a) * float(b) for a, b in zip(teacher[i], teacher[j], strict=True))
            total += (theirs - ours) ** 2
    return total


def levels(view, temperature, *, normal=lambda logits: logits):
    """Image, batch and class level of one view, by loops."""
    p, q = ((logits.detach() / temperature).softmax(dim=1) for logits in view)
    zs, zt = (normal(logits.detach()) / temperature for logits in view)
    kl = (zt.softmax(1) * (zt.log_softmax(1) - zs.log_softmax(1))).sum().item() / B
    return temperature**2 * kl, gram_distance(p, q) / B, gram_distance(p.T, q.T) / K


def test_relations_equal_loops_over_images_and_classes():
    student, teacher, _ = made()
    view = (student.logits, teacher.logits)
    _, batch, classes = levels(view, 3.0)
    assert mlld_batch_loss(*view, temperature=3.0).item() == pytest.approx(batch, rel=1e-5)
    assert mlld_class_loss(*view, temperature=3.0).item() == pytest.approx(classes, rel=1e-5)


def test_relations_have_no_factor_of_temperature_squared():
    student, teacher, _ = made()
    small = mlld_batch_loss(student.logits, teacher.logits, temperature=2.0)
    torch.testing.assert_close(mlld_batch_loss(10 * student.logits, 10 * teacher.logits, temperature=20.0), small)


def shares(teacher):
    """Shares of images and of classes up to the median, with the median worked out by sorting."""
    p = teacher.logits.softmax(dim=1)
    found = []
    for values in (p.max(dim=1).values.tolist(), p.sum(dim=0).tolist()):
        middle = sorted(values)
        median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
        found.append(sum(value <= median for value in values) / len(values))
    return found


@pytest.mark.parametrize(("base", "normal"), [(4.0, False), (2.0, True)])
def test_release_multiplies_by_shares_and_reads_the_usual_view_for_two_temperatures(base, normal):
    student, teacher, batch = made()
    weak, strong = (student.logits, teacher.logits), (student.second.logits, teacher.second.logits)
    images, classes = shares(teacher)
    assert (images, classes) == (3 / 5, 2 / 3)
    function = standardise if normal else (lambda logits: logits)
    at = [levels(weak, t, normal=function) for t in (base, 3.0, 5.0, 2.0, 6.0)]
    read = [levels(strong, t, normal=function) for t in (base, 3.0, 5.0)] + at[3:]
    terms = MLLD(temperature=base, kd_weight=0.7, standardise=normal)(student, teacher, batch)
    image = images * sum(a[0] for a in at) + sum(a[0] for a in read)
    assert terms["kd"].item() == pytest.approx(0.7 * image, rel=1e-5)
    assert terms["batch_relation"].item() == pytest.approx(0.7 * images * sum(a[1] for a in at), rel=1e-5)
    assert terms["class_relation"].item() == pytest.approx(0.7 * classes * sum(a[2] for a in at), rel=1e-5)


def test_paper_has_every_level_in_both_views_without_masks():
    student, teacher, batch = made()
    views = (student.logits, teacher.logits), (student.second.logits, teacher.second.logits)
    found = [levels(view, t) for view in views for t in (4.0, 3.0, 5.0, 2.0, 6.0)]
    terms = MLLD(form="paper", kd_weight=1.0)(student, teacher, batch)
    for position, name in enumerate(("kd", "batch_relation", "class_relation")):
        assert terms[name].item() == pytest.approx(sum(each[position] for each in found), rel=1e-5)


def test_labels_count_in_both_views():
    student, teacher, batch = made()
    method = MLLD(ce_weight=0.3)
    terms = method(student, teacher, batch)
    torch.testing.assert_close(terms["ce"], 0.3 * F.cross_entropy(student.logits, batch.labels))
    torch.testing.assert_close(terms["ce_strong"], 0.3 * F.cross_entropy(student.second.logits, batch.labels))
    assert method.label_term_names == {"ce", "ce_strong"} <= set(terms)


def test_gradient_reaches_both_views_and_no_teacher():
    student, teacher, batch = made()
    teacher.logits.requires_grad_(True)
    terms = MLLD(form="paper", ce_weight=0.0)(student, teacher, batch)
    (terms["kd"] + terms["batch_relation"] + terms["class_relation"]).backward()
    assert student.logits.grad.abs().sum() > 0
    assert student.second.logits.grad.abs().sum() > 0
    assert teacher.logits.grad is None


def test_presets_are_the_authors():
    imagenet = create_method("mlld", preset="imagenet")
    assert (imagenet.temperature, imagenet.ce_weight, imagenet.kd_weight) == (1.0, 0.5, 0.5)
    assert (create_method("mlld").form, create_method("mlld").ce_weight) == ("release", 0.1)


def test_image_level_alone_is_hintons_loss():
    student, teacher, batch = made()
    teacher.second.logits = student.second.logits.detach()
    teacher.logits = student.logits.detach().clone()
    teacher.logits[0] += torch.tensor([1.0, 0.0, 0.0])
    kd = sum(kd_loss(student.logits, teacher.logits, temperature=t) for t in (4.0, 3.0, 5.0, 2.0, 6.0))
    terms = MLLD(form="paper", kd_weight=1.0)(student, teacher, batch)
    torch.testing.assert_close(terms["kd"], kd)
