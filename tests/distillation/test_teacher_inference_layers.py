import copy

import pytest
import torch
from torch import nn

from potstill.distillation.teacher_inference import use_fast_cpu_layers
from potstill.models.factory import create_model


def rewritten(layer):
    other = nn.Sequential(copy.deepcopy(layer))
    use_fast_cpu_layers(other)
    return other[0]


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 4, 2, 2), (2, 3, 7, 6), (2, 3, 6, 7), (3, 8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_maximum_is_the_same_bit_by_bit(shape, layout):
    images = torch.randn(shape)
    if len(shape) == 4:
        images = images.to(memory_format=layout)
        images[0, 0, 0, 0] = float("nan")
    layer = nn.MaxPool2d(2)
    found = rewritten(layer)(images)
    torch.testing.assert_close(found, layer(images), rtol=0, atol=0, equal_nan=True)
    if len(shape) == 4:
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, return_indices=True),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 3),
    ],
)
def test_other_layers_stay_as_they_are(layer):
    assert type(rewritten(layer)) is type(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_point_convolution_gives_the_same_sums(bias, places, layout):
    layer = nn.Conv2d(6, 5, 1, bias=bias).to(memory_format=layout)
    images = torch.randn(4, 6, *places).to(memory_format=layout)
    found = rewritten(layer)(images)
    assert found.shape == (4, 5, *places)
    torch.testing.assert_close(found, layer(images))


def test_a_point_is_a_matrix_product(monkeypatch):
    calls = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda *given: calls.append(1) or plain(*given))
    rewritten(nn.Conv2d(6, 5, 1))(torch.randn(4, 6, 1, 1))
    assert calls == [1]


@pytest.mark.parametrize("name", ["cifar/vgg8", "timm/test_efficientnet", "torchvision/mobilenet_v2"])
def test_whole_networks(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=4, size=64).eval()
    other = copy.deepcopy(network)
    use_fast_cpu_layers(other)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images), network(images), rtol=1e-4, atol=1e-5)
    assert {type(module) for module in other.modules()} != {type(module) for module in network.modules()}
    assert other.state_dict().keys() == network.state_dict().keys()
