"""BatchNorm goes where it can, stays where it must, and the numbers stay the same in any case."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from potstill.distillation.teacher_inference import fold_batch_norms

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(network):
    """As after training: statistics and affine parameters that are not those of a fresh BatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.uniform_(module.bias, -1.0, 1.0)
    return network.eval()


def norms(network):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def check(network, images=IMAGES, *, folded, left):
    with torch.no_grad():
        before = trained(network)(images)
        assert fold_batch_norms(network, images) == folded
        torch.testing.assert_close(network(images), before, atol=1e-5, rtol=1e-5)
    assert norms(network) == left


def test_by_hand():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)).eval()
    with torch.no_grad():
        for tensor, value in zip(
            (network[0].weight, network[0].bias, network[1].weight, network[1].bias), (3.0, 1.0, 2.0, 5.0), strict=True
        ):
            tensor.fill_(value)
        network[1].running_mean.fill_(7.0)
        network[1].running_var.fill_(3.0)
    assert fold_batch_norms(network, torch.rand(2, 1, 2, 2)) == 1
    # 2 (3x + 1 - 7) / sqrt(3 + 1) + 5 = 3x - 1
    assert (network[0].weight.item(), network[0].bias.item()) == (3.0, -1.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(bias, affine, groups):
    check(
        nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=groups, bias=bias), nn.BatchNorm2d(6, affine=affine), nn.ReLU()),
        folded=1,
        left=0,
    )


def test_linear_layers():
    check(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.Tanh()), folded=1, left=0)


class NormAct(nn.BatchNorm2d):
    """Activates too, as timm's does, and after a drop of its own."""

    def __init__(self, width):
        super().__init__(width)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_an_activation_inside_the_norm_stays():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), NormAct(6), nn.Conv2d(6, 4, 3))
    check(network, folded=1, left=0)
    assert network[:2](IMAGES).min() == 0


class Residual(nn.Module):
    """The convolution's output goes around its BatchNorm as well."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "before":
            other = y * 2
            return self.bn(y) + other
        z = self.bn(y)
        if self.how == "list":
            return torch.cat([z, y], dim=1)
        if self.how == "method":
            return z + y.mean()
        return z + y


@pytest.mark.parametrize("how", ["before", "list", "method", "operator"])
def test_an_output_that_others_use_is_left_alone(how):
    check(Residual(how), folded=0, left=1)


class Twice(nn.Module):
    def __init__(self, *, norm):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second = self.first if norm else nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)).relu()))


@pytest.mark.parametrize("norm", [True, False])
def test_what_is_called_twice_is_left_alone(norm):
    check(Twice(norm=norm), folded=0, left=1 if norm else 2)


class Standardised(nn.Conv2d):
    """Divides its weights by their deviation before use, so that a factor on them does nothing."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_layer_that_changes_its_weights_is_left_alone():
    check(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)), folded=0, left=1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    check(nn.Sequential(parametrized, nn.BatchNorm2d(4)), folded=0, left=1)


def test_a_norm_before_the_layer_or_without_statistics_is_left_alone():
    check(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), folded=0, left=1)
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), folded=0, left=1)
    batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norms(batch, IMAGES) == 0


def test_each_where_it_can_be():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    check(network, folded=2, left=1)


def test_no_hooks_are_left():
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fold_batch_norms(network, IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
