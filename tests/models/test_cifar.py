"""The networks of the distillation literature: exact sizes, resolutions, and blocks against torchvision's."""

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleUnit

from potstill.features.stages import find_stages
from potstill.models.factory import create_model

# Of the networks that RepDistiller publishes, for 100 classes.
PUBLISHED = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}


def network(name: str, size: int = 32) -> nn.Module:
    return create_model(f"cifar/{name}", 100, size=size)


# He et al., table 6, in millions, for 10 classes; the shortcuts have no weights there.
OPTION_A = {"resnet20_a": 0.27, "resnet32_a": 0.46, "resnet44_a": 0.66, "resnet56_a": 0.85, "resnet110_a": 1.7}


@pytest.mark.parametrize("name", OPTION_A)
def test_parameters_of_option_a_are_the_papers(name):
    total = sum(parameter.numel() for parameter in create_model(f"cifar/{name}", 10, size=32).parameters())
    assert round(total / 1e6, 1 if name == "resnet110_a" else 2) == OPTION_A[name]
    other = create_model(f"cifar/{name.removesuffix('_a')}", 10, size=32)
    assert sum(parameter.numel() for parameter in other.parameters()) - total == 2752


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert sum(parameter.numel() for parameter in network(name).parameters()) == PUBLISHED[name]


def test_the_parameters_of_a_grouped_network_by_hand():
    def unit(inputs, branch, inner, groups):
        return (inputs * inner // groups + 9 * inner + inner * branch // 3) + 2 * (2 * inner + branch)

    total = 3 * 24 + 2 * 24 + 960 * 100 + 100  # stem and head
    for inputs, outputs, blocks in ((24, 240, 4), (240, 480, 8), (480, 960, 4)):
        total += unit(inputs, outputs - inputs, (outputs - inputs) // 4, 1 if inputs == 24 else 3)
        total += (blocks - 1) * unit(outputs, outputs, outputs // 4, 3)
    assert total == PUBLISHED["shufflenetv1"]


@pytest.mark.parametrize(
    ("name", "maps", "embedding"),
    [
        ("resnet50", [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
        ("mobilenetv2", [(12, 16), (16, 8), (48, 4), (1280, 2)], 1280),
        ("shufflenetv1", [(240, 16), (480, 8), (960, 4)], 960),
        ("shufflenetv2", [(116, 16), (232, 8), (1024, 4)], 1024),
    ],
)
def test_stages_have_the_published_resolutions(name, maps, embedding):
    # RepDistiller's features; where a 1x1 convolution follows the last stage, it is part of it here
    found = find_stages(network(name), torch.zeros(2, 3, 32, 32))
    assert [(stage.channels, stage.height) for stage in found.stages] == maps
    assert (found.head, found.embedding, found.pooled) == ("head", embedding, True)


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_they_learn_from_images_of_other_sizes(name):
    model = network(name, size=48)
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def same(ours: nn.Module, peer: nn.Module, channels: int) -> None:
    """Both give the same for equal weights, which stand in the same order."""
    values = [value for key, value in ours.state_dict().items() if "tracked" not in key]
    keys = [key for key in peer.state_dict() if "tracked" not in key]
    peer.load_state_dict(dict(zip(keys, values, strict=True)), strict=False)
    images = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), peer.eval()(images))


def varied(module: nn.Module) -> nn.Module:
    """BatchNorm of a fresh network changes nothing in eval mode; here it does."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight, part.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (part.bias, part.running_mean):
                nn.init.normal_(value)
    return module


def test_bottlenecks_are_torchvisions():
    blocks = network("resnet50").stage2
    shortcut = nn.Sequential(nn.Conv2d(256, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
    same(varied(blocks[0]), Bottleneck(256, 128, 2, shortcut), 256)
    same(varied(blocks[1]), Bottleneck(512, 128), 512)


@pytest.mark.parametrize(("stage", "position", "inputs", "stride", "outputs"), [(2, 0, 12, 2, 16), (2, 1, 16, 1, 16)])
def test_inverted_residuals_are_torchvisions_but_for_relu6(stage, position, inputs, stride, outputs):
    block = network("mobilenetv2").get_submodule(f"stage{stage}.{position}")
    peer = InvertedResidual(inputs, outputs, stride, 6)
    for layers in (peer.conv[0], peer.conv[1]):
        layers[2] = nn.ReLU()
    same(varied(block), peer, inputs)


def test_shuffling_units_are_torchvisions():
    blocks = network("shufflenetv2").stage2
    same(varied(blocks[0]), ShuffleUnit(116, 232, 2), 116)
    same(varied(blocks[1]), ShuffleUnit(232, 232, 1), 232)


def test_a_unit_of_the_first_version_by_a_slow_reference():
    unit = varied(network("shufflenetv1").stage2[1]).eval()
    images = torch.randn(1, 480, 3, 3)

    def grouped(convolution, x):  # three groups, each of which sees a third of the channels
        parts = zip(x.chunk(3, dim=1), convolution.weight.chunk(3), strict=True)
        return torch.cat([torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], part) for part, weight in parts], dim=1)

    with torch.no_grad():
        inner = unit.bn1(grouped(unit.conv1, images)).relu()
        # 120 channels in three groups of 40: the first of each group, the second of each, ...
        inner = torch.stack([inner[:, group * 40 + place] for place in range(40) for group in range(3)], dim=1)
        inner = unit.bn2(unit.conv2(inner)).relu()
        torch.testing.assert_close(unit(images), (unit.bn3(grouped(unit.conv3, inner)) + images).relu())


def test_a_halving_unit_of_the_first_version_keeps_its_averaged_input():
    unit = varied(network("shufflenetv1").stage2[0]).eval()
    images = torch.rand(1, 240, 4, 4)
    with torch.no_grad():
        out = unit(images)
    assert out.shape == (1, 480, 2, 2)
    # a window of 3x3 around the first pixel has five places beyond the border, which count as zeros
    torch.testing.assert_close(out[0, 240:, 0, 0], images[0, :, :2, :2].sum(dim=(1, 2)) / 9)
    torch.testing.assert_close(out[0, 240:, 1, 1], images[0, :, 1:4, 1:4].mean(dim=(1, 2)))
    assert out.min() >= 0
