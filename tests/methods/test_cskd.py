import math

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods.cskd import CSKD
from potstill.types import Batch, Outputs

LABELS = torch.tensor([0, 1])


def test_the_other_image_is_the_teacher():
    said, other = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    student = Outputs(said.requires_grad_(True), second=Outputs(other.requires_grad_(True)))
    terms = CSKD(weight=2.0, temperature=1.0)(student, None, Batch(torch.zeros(2, 3, 1, 1), LABELS))
    kl = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2  # of two images
    assert terms["cskd"].item() == pytest.approx(2 * kl, rel=1e-6)
    assert terms["ce"].item() == pytest.approx(math.log(2), rel=1e-6)  # of the first images alone
    terms["cskd"].backward()
    assert said.grad.abs().sum() > 0
    assert other.grad is None


def normalised(images):
    """Each by the statistics of its own batch, as in train mode."""
    flat = images.flatten(1)
    return (flat - flat.mean(dim=0)) / (flat.var(dim=0, correction=0) + 1e-5).sqrt()


def test_second_images_pass_in_train_mode_without_gradient():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(12)
    student = nn.Sequential(nn.Flatten(), norm, nn.Linear(12, 2))
    distiller = Distiller(student, None, CSKD())
    images, second = torch.randn(4, 3, 2, 2), 5 + torch.randn(4, 3, 2, 2)
    labels = torch.tensor([0, 1, 0, 1])
    with_gradient = []
    norm.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    step = distiller(images, labels, second=second)
    assert with_gradient == [True, False]
    # two updates of the running mean, the second by the second images
    mean = 0.9 * (0.1 * images.flatten(1).mean(dim=0)) + 0.1 * second.flatten(1).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, mean)
    step.terms["cskd"].backward()
    ours, theirs = normalised(images), normalised(second)
    weight = student[2].weight.detach().clone().requires_grad_(True)
    said = ours @ weight.T + student[2].bias.detach()
    other = (theirs @ weight.T + student[2].bias).detach()
    p = (other / 4).softmax(1)
    (16 * (p * (p.log() - (said / 4).log_softmax(1))).sum() / 4).backward()
    torch.testing.assert_close(student[2].weight.grad, weight.grad, rtol=1e-4, atol=1e-6)


def test_without_second_images_it_says_what_is_missing():
    distiller = Distiller(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), None, CSKD())
    with pytest.raises(UsageError, match="one of the same class"):
        distiller(torch.zeros(2, 3, 2, 2), LABELS)
    assert list(distiller.eval()(torch.zeros(2, 3, 2, 2), LABELS).terms) == ["ce"]
