import pytest
import torch
from test_simkd import IMAGES, LABELS, network
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import kd_loss, norm_loss
from potstill.methods.norm import NORM


def distiller(student=None, teacher=None, **options):
    made = Distiller(student or network(4), teacher or network(8), NORM(**options), example=IMAGES)
    made.start_epoch(30, 240)
    return made


def test_loss_equals_that_against_the_repeated_map():
    expanded, teacher = torch.randn(2, 3 * 4, 2, 2), torch.randn(2, 4, 4, 4)
    pooled = torch.nn.functional.max_pool2d(teacher, 2)
    wanted = 3 * (expanded - pooled.repeat(1, 3, 1, 1)).square().mean()
    assert norm_loss(expanded, teacher).item() == pytest.approx(wanted.item(), rel=1e-6)
    larger = torch.randn(2, 3 * 4, 8, 8)
    wanted = 3 * (torch.nn.functional.max_pool2d(larger, 2) - teacher.repeat(1, 3, 1, 1)).square().mean()
    assert norm_loss(larger, teacher).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_term_reads_the_expanded_map_and_the_logits_pass_through_it():
    joined = distiller(weight=2.0, representations=3, ce_weight=0.5)
    step = joined(IMAGES, LABELS)
    assert step.terms.keys() == {"ce", "matching"}
    student = joined.student
    with torch.no_grad():
        features = student.network[:5](IMAGES)
        old, block = student.network[5]
        features = old(features)
        expanded = block.expand(features)
        raw = student.network[6:](block.back(expanded) + features)
        target = joined.teacher.networks[0][:6](IMAGES)
    assert expanded.shape[1] == 3 * 8
    wanted = 2 * 3 * (expanded - target.repeat(1, 3, 1, 1)).square().mean()
    assert step.terms["matching"].item() == pytest.approx(wanted.item(), rel=1e-5)
    deviation = raw - raw.mean(dim=1, keepdim=True)
    scaled = 2.5 * deviation / (deviation.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
    assert torch.allclose(step.logits, scaled, atol=1e-4)
    ce = nn.functional.cross_entropy(scaled, LABELS)
    assert step.terms["ce"].item() == pytest.approx(0.5 * ce.item(), rel=1e-4)


def test_soft_targets_use_both_networks_scaled_logits():
    joined = distiller(kd_weight=1.0)
    step = joined(IMAGES, LABELS)
    with torch.no_grad():
        theirs = joined.run_teacher(IMAGES).logits
    deviation = theirs - theirs.mean(dim=1, keepdim=True)
    scaled = 2.5 * deviation / (deviation.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
    assert step.terms["kd"].item() == pytest.approx(kd_loss(step.logits, scaled, temperature=4.0).item(), rel=1e-4)


def test_schedule_of_the_release():
    method = NORM()
    for epoch, weight in (
        (0, 0.1),
        (9, 0.1),
        (10, 0.5),
        (19, 0.5),
        (20, 1),
        (179, 1),
        (180, 0.5),
        (210, 0.1),
        (239, 0.1),
    ):
        method.start_epoch(epoch, 240)
        assert method.scheduled() == weight
    method = NORM(profile="imagenet")
    for epoch, weight in ((4, 0.1), (5, 0.5), (15, 0.9), (60, 0.5), (80, 0.1)):
        method.start_epoch(epoch, 100)
        assert method.scheduled() == weight
    method = NORM(profile="constant")
    method.start_epoch(7, 8)
    assert method.scheduled() == 1


def test_block_learns_and_merges():
    joined = distiller()
    optimizer = torch.optim.SGD([parameter for _, parameter in joined.trained_parameters()], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        step = joined(IMAGES, LABELS)
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < losses[0]
    assert joined.student.get_submodule(joined.student.tap)[0].weight.grad.norm() > 0
    joined.eval()
    assert torch.allclose(joined.student.merged()(IMAGES), joined.student(IMAGES), atol=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="got 2 teachers"):
        distiller(teacher=[network(8), network(8)])
    with pytest.raises(UsageError, match=r"was changed already \(expanded_stage"):
        distiller(student=distiller().student)
    with pytest.raises(UsageError, match="no multiple"):
        norm_loss(torch.zeros(1, 7, 1, 1), torch.zeros(1, 3, 1, 1))


def test_method_can_be_used_again():
    method = NORM()
    for _ in range(2):
        made = Distiller(network(4), network(8), method, example=IMAGES)
        made.start_epoch(0, 10)
        assert made(IMAGES, LABELS).loss.isfinite()
