"""IKL and GKL, which differ in their weights."""

import math

import pytest
import torch
from torch.nn import functional as F

from potstill.functional import gkl_wmse_loss, ikl_soft_ce_loss, ikl_wmse_loss
from potstill.methods import create_method
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.gkl import GKL
from potstill.methods.ikl import IKL
from potstill.types import Batch, Outputs

B, K = 5, 4


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(B, K, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(B, K, generator=generator).softmax(dim=1)


def pairs(student, teacher, weights):
    """The double sum by loops, without the quarter; and the sum of all products of weights."""
    total = norm = 0.0
    for zs, zt, w in zip(student.tolist(), teacher.tolist(), weights.tolist(), strict=True):
        for i in range(K):
            for j in range(K):
                total += w[i] * w[j] * ((zt[i] - zt[j]) - (zs[i] - zs[j])) ** 2
                norm += w[i] * w[j]
    return total, norm


def test_differences_equal_the_double_sum():
    student, teacher, weights = made()
    total, _ = pairs(student, teacher, weights)
    assert ikl_wmse_loss(student, teacher, weights).item() == pytest.approx(total / 4 / B, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.6, 1.0])
def test_gkl_raises_weights_and_divides_by_their_sum_over_the_batch(gamma):
    student, teacher, weights = made()
    total, norm = pairs(student, teacher, weights**gamma)
    assert gkl_wmse_loss(student, teacher, weights, gamma=gamma).item() == pytest.approx(total / 4 / norm, rel=1e-5)


def test_differences_do_not_see_a_shift_but_scale_with_logits():
    student, teacher, weights = made()
    plain = ikl_wmse_loss(student, teacher, weights)
    torch.testing.assert_close(ikl_wmse_loss(student + 7, teacher, weights), plain)
    torch.testing.assert_close(ikl_wmse_loss(2 * student, 2 * teacher, weights), 4 * plain)


def test_soft_cross_entropy_has_no_factor_of_temperature_squared():
    student, teacher, _ = made()
    slow = -((teacher / 4).softmax(1) * (student / 4).log_softmax(1)).sum().item() / B
    assert ikl_soft_ce_loss(student, teacher, temperature=4.0).item() == pytest.approx(slow, rel=1e-6)


def test_is_finite_at_a_gap_of_900():
    student = torch.tensor([[900.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 900.0, 0.0]])
    loss = ikl_wmse_loss(student, teacher, teacher.softmax(1)) + ikl_soft_ce_loss(student, teacher, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(900)  # the weights leave one class, so no difference counts
    assert student.grad.isfinite().all()


def ready(method):
    method.build(NetworkInfo(Outputs(torch.zeros(2, 2))), None, TrainingInfo(classes=2))
    method.start_epoch(0, 10)
    return method.train()


TEACHER = torch.tensor([[math.log(4.0), 0.0], [math.log(1.5), 0.0]])  # (0.8, 0.2) and (0.6, 0.4)
BATCH = Batch(torch.zeros(2, 3, 1, 1), torch.tensor([0, 0]))


def step(method):
    return method(Outputs(torch.zeros(2, 2)), Outputs(TEACHER), BATCH)


@pytest.mark.parametrize("kind", [IKL, GKL])
def test_class_prior_is_uniform_first_and_then_the_last_epochs_mean(kind):
    method = ready(kind(class_prior=True, weight_temperature=1.0, warmup_epochs=0))
    assert method.prior.rows.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    step(method)
    assert method.prior.rows.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    method.start_epoch(1, 10)
    torch.testing.assert_close(method.prior.rows, torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    method.start_epoch(1, 10)  # said twice, as after a resumption
    torch.testing.assert_close(method.prior.rows, torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    method.eval()
    step(method)
    assert method.prior.counts.tolist() == [0, 0]


def test_class_prior_weighs_the_differences():
    method = ready(IKL(class_prior=True, weight_temperature=1.0, warmup_epochs=0, beta=8.0))
    first = step(method)["wmse"].item()
    squares = (math.log(4.0) ** 2 + math.log(1.5) ** 2) / 2
    assert first == pytest.approx(8 * 0.25 * 2 * 0.5 * 0.5 * squares, rel=1e-5)
    method.start_epoch(1, 10)
    assert step(method)["wmse"].item() == pytest.approx(8 * 0.25 * 2 * 0.7 * 0.3 * squares, rel=1e-5)


def test_without_class_prior_the_teachers_probabilities_weigh():
    method = IKL(weight_temperature=1.0, warmup_epochs=0)
    assert (method.needs.classes, method.needs.labels) == (False, False)
    method.start_epoch(0, 10)
    wanted = 8 * 0.25 * 2 * (0.8 * 0.2 * math.log(4.0) ** 2 + 0.6 * 0.4 * math.log(1.5) ** 2) / 2
    assert step(method)["wmse"].item() == pytest.approx(wanted, rel=1e-5)


def test_weights_rise_to_one_and_presets_are_the_authors():
    method = create_method("ikl", preset="cifar100", alpha=3.0)
    for epoch, factor in [(0, 0.05), (9, 0.5), (30, 1.0)]:
        method.start_epoch(epoch, 240)
        soft = F.cross_entropy(torch.zeros(2, 2), (TEACHER / 4).softmax(1)).item()
        assert step(method)["soft_ce"].item() == pytest.approx(factor * 3 * soft, rel=1e-5)
    generalized = create_method("gkl", preset="cifar100/resnet32x4-resnet8x4")
    assert (generalized.beta, generalized.gamma, generalized.weight_temperature) == (16.0, 0.05, 4.0)
    assert generalized.class_prior
