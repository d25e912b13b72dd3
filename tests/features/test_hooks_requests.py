import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.features.hooks import capture_outputs


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_hooks_are_gone_even_when_the_model_raises():
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    with pytest.raises(RuntimeError), capture_outputs(net, ["0", "1"]):
        net(torch.zeros(1, 5))
    assert not any(module._forward_hooks for module in net.modules())


def test_hooks_are_gone_when_a_path_is_wrong():
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    with pytest.raises(UsageError, match="has no layer 'layer4'"), capture_outputs(net, ["0", "layer4"]):
        pass
    assert not any(module._forward_hooks for module in net.modules())


def test_nearest_path_is_named():
    net = nn.ModuleDict({"stage2": nn.Linear(1, 1)})
    with pytest.raises(UsageError, match="did you mean 'stage2'"), capture_outputs(net, ["stage3"]):
        pass


def test_only_tensors_can_be_tapped():
    net = nn.Sequential(Pair())
    with pytest.raises(UsageError, match="is tuple, not a tensor"), capture_outputs(net, ["0"]):
        net(torch.zeros(1))
