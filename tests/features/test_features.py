import pytest
import torch
import torch.nn.functional as F
from torch import nn

from potstill.errors import UsageError
from potstill.features import ConvAdapter, Projection, pool_to_common_size, resize_map


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((2, 3, 8, 8), (2, 5, 8, 8), nn.Conv2d, (1, 1)),
        ((2, 3, 8, 8), (2, 5, 4, 4), nn.Conv2d, (3, 3)),  # half
        ((2, 3, 4, 4), (2, 5, 8, 8), nn.ConvTranspose2d, (4, 4)),  # double
        ((2, 3, 8, 8), (2, 5, 5, 5), nn.Conv2d, (4, 4)),
        ((2, 3, 8, 6), (2, 5, 5, 5), nn.Conv2d, (4, 2)),
        ((2, 3, 8, 16), (2, 5, 4, 8), nn.Conv2d, (3, 3)),
        # what the published adapter cannot join:
        ((2, 3, 4, 4), (2, 5, 7, 7), nn.Conv2d, (1, 1)),  # larger by less than double
        ((2, 3, 4, 4), (2, 5, 16, 16), nn.Conv2d, (1, 1)),  # larger by more
        ((2, 3, 4, 8), (2, 5, 8, 8), nn.Conv2d, (1, 1)),  # higher, not wider
        ((2, 512, 56, 56), (2, 512, 7, 7), nn.Conv2d, (1, 1)),  # 655 million weights otherwise
        ((2, 3, 1, 1), (2, 5, 4, 4), nn.Conv2d, (1, 1)),
    ],
)
def test_every_pair_of_sizes_can_be_joined(student, teacher, kind, kernel):
    adapter = ConvAdapter(student, teacher)
    assert isinstance(adapter.conv, kind)
    assert adapter.conv.kernel_size == kernel
    adapted = adapter(torch.randn(student))
    assert adapted.shape == teacher
    adapted.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())
    assert sorted(dict(adapter.named_parameters())) == ["conv.bias", "conv.weight", "norm.bias", "norm.weight"]


def test_the_resized_adapter_by_a_slow_reference():
    adapter = ConvAdapter((2, 3, 4, 4), (2, 5, 7, 7)).eval()
    features = torch.randn(2, 3, 4, 4)
    larger = F.interpolate(features, size=(7, 7), mode="bilinear", align_corners=False)
    by_hand = torch.einsum("bchw,kc->bkhw", larger, adapter.conv.weight[:, :, 0, 0])
    by_hand = (by_hand + adapter.conv.bias.view(1, -1, 1, 1)) / (1 + adapter.norm.eps) ** 0.5
    torch.testing.assert_close(adapter(features), by_hand.clamp(min=0))


@pytest.mark.parametrize("shape", [(2, 8), (2, 17, 8)])
def test_only_maps_are_adapted(shape):
    for adapter in (ConvAdapter, Projection):
        with pytest.raises(UsageError, match="joins feature maps"):
            adapter(shape, (2, 8, 4, 4))


def test_same_size_averages_the_larger():
    student = torch.tensor([[[[1.0, 3.0, 5.0, 7.0]]]])  # 1 x 4
    teacher = torch.tensor([[[[2.0], [6.0]]]])  # 2 x 1
    ours, theirs = pool_to_common_size(student, teacher)
    assert ours.tolist() == [[[[4.0]]]]
    assert theirs.tolist() == [[[[4.0]]]]
    equal = torch.randn(2, 3, 4, 4)
    assert pool_to_common_size(equal, equal)[0] is equal


def test_resizing_keeps_what_it_need_not_change():
    features = torch.randn(2, 3, 4, 6)
    assert resize_map(features, (4, 6)) is features
    torch.testing.assert_close(resize_map(features, (1, 1))[:, :, 0, 0], features.mean(dim=(2, 3)))
    assert resize_map(features, (8, 2)).shape == (2, 3, 8, 2)


@pytest.mark.parametrize(("norm", "activation"), [(False, False), (True, False), (True, True)])
def test_projection(norm, activation):
    projection = Projection((2, 3, 4, 6), (2, 5, 8, 8), norm=norm, activation=activation)
    projected = projection(torch.randn(2, 3, 4, 6))
    assert projected.shape == (2, 5, 4, 6)
    assert (projection.conv.bias is None) == norm
    assert bool((projected < 0).any()) != activation
    if norm and not activation:
        torch.testing.assert_close(projected.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
