"""Grad-CAM against values worked out by hand, on networks of several kinds."""

import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.evaluation.gradcam import grad_cam, visible_region
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model


def by_hand() -> nn.Module:
    """Two maps: red, and green; logits: their means, times (3, -1) and (0, 2)."""
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[..., None, None])
        net[4].weight.copy_(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    return net


def test_a_worked_example():
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0] = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    image[0, 1] = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    # Of class 0: 3 red - green = 12, 1, -4, 0, cut at 0, over 12; the mean's 1/4 cancels out.  Of class 1: 2 green.
    cams = grad_cam(by_hand(), image.repeat(2, 1, 1, 1), [0, 1])
    torch.testing.assert_close(cams[0], torch.tensor([[1.0, 1 / 12], [0.0, 0.0]]))
    torch.testing.assert_close(cams[1], torch.tensor([[0.0, 1 / 3], [2 / 3, 1.0]]))


def test_nothing_speaks_for_the_class():
    assert grad_cam(by_hand(), torch.zeros(1, 3, 2, 2), [0]).count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar/resnet8", 32),
        ("cifar/vgg8", 32),
        ("vit_tiny_patch16_224", 64),  # reads its class token
        ("mixer_s32_224", 64),
        ("mobilevit_xxs", 64),
        ("swin_tiny_patch4_window7_224", 64),  # channels last
        ("xcit_nano_12_p16_224", 64),
    ],
)
def test_networks_of_each_kind(name, size):
    net = create_model(name, 5, size=size).train().requires_grad_(False)
    torch.nn.init.normal_([part for part in net.modules() if isinstance(part, nn.Linear)][-1].weight)
    cams = grad_cam(net, torch.rand(3, 3, size, size), torch.tensor([0, 1, 2]))
    assert cams.ndim == 3
    assert len(cams) == 3
    assert 0 <= float(cams.min()) <= float(cams.max()) <= 1
    assert float(cams.max()) == pytest.approx(1)
    assert net.training
    assert all(each.grad is None for each in net.parameters())


def test_classes_and_images_must_match():
    with pytest.raises(UsageError, match="one class for each of 2 images"):
        grad_cam(by_hand(), torch.rand(2, 3, 2, 2), [0])


def test_a_network_without_maps_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(UsageError, match="feature map"):
        grad_cam(net, torch.rand(1, 3, 2, 2), [0])


@pytest.mark.parametrize(
    ("height", "width", "spec", "region"),
    [
        (64, 64, InputSpec(32), [0, 0, 1, 1]),
        (100, 200, InputSpec(32), [0.25, 0, 0.5, 1]),  # the square in the middle
        (100, 200, InputSpec(32, resize_mode="stretch"), [0, 0, 1, 1]),
        (100, 200, InputSpec(32, resize_mode="pad"), [0, -0.5, 1, 2]),  # 50 pixels above and below
        (300, 100, InputSpec(80, crop_share=0.8), [0.1, 0.36667, 0.8, 0.26667]),  # 80 of the square's 100 pixels
    ],
)
def test_the_part_of_the_image_that_a_network_sees(height, width, spec, region):
    assert visible_region(height, width, spec) == pytest.approx(region, abs=1e-5)
