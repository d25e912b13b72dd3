"""Channels that are removed, and networks that are built again from their widths."""

import importlib.util

import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.models.pruning import count_weights, cut_channels, describe_widths, prune_channels
from potstill.models.registry import build_model

needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed (extra prune)"
)
UNIT = 2.0**-24  # so that no output overflows, and numbers stay exact
RESIDUAL, SEPARABLE = ("cifar/resnet8", 16), ("timm/mobilenetv3_small_050", 32)


def number_channels(network: nn.Module) -> None:
    """Give each weight the numbers of its output and input as its value, so that what is left says what it was.

    The first channels of each layer are the smallest, which pruning removes.
    """
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                rows, columns = layer.weight.shape[:2]
                numbers = (4096 * torch.arange(1, rows + 1)[:, None] + torch.arange(1, columns + 1)) * UNIT
                layer.weight.copy_(numbers.float().reshape(rows, columns, *[1] * (layer.weight.ndim - 2)))


def kept_channels(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = layer.weight.detach().flatten(2)[..., 0] if layer.weight.ndim > 2 else layer.weight.detach()
    numbers = (numbers / UNIT).long()
    return numbers[:, 0] // 4096 - 1, numbers[0] % 4096 - 1


@needs_torch_pruning
@pytest.mark.parametrize(("architecture", "size"), [RESIDUAL, SEPARABLE])
def test_removed_channels_that_put_out_nothing_change_nothing(architecture, size):
    """Reference: the whole network, in which the removed channels are 0 wherever they are computed."""
    torch.manual_seed(0)
    whole = build_model(architecture, 5, size=size).eval()
    numbered = build_model(architecture, 5, size=size).eval()
    number_channels(numbered)
    pruned = prune_channels(numbered, 0.5, size=size, architecture=architecture)
    state, layers = whole.state_dict(), dict(whole.named_modules())
    cut = {}
    outputs = None
    for path, layer in pruned.named_modules():
        original = layers[path]
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            outputs, inputs = kept_channels(layer)
            gone = torch.ones(original.weight.shape[0], dtype=torch.bool)
            gone[outputs] = False
            with torch.no_grad():
                original.weight[gone] = 0
                cut[f"{path}.weight"] = original.weight[outputs][:, inputs]
                if original.bias is not None:
                    original.bias[gone] = 0
                    cut[f"{path}.bias"] = original.bias[outputs]
        elif isinstance(layer, nn.BatchNorm2d):  # of the convolution before it
            with torch.no_grad():
                original.weight.uniform_(0.5, 1.5)
                original.bias.uniform_(-0.5, 0.5)
                original.running_mean.uniform_(-0.1, 0.1)
                for name in ("weight", "bias", "running_mean"):
                    getattr(original, name)[gone] = 0
            for name in ("weight", "bias", "running_mean", "running_var"):
                cut[f"{path}.{name}"] = state[f"{path}.{name}"][outputs]
            cut[f"{path}.num_batches_tracked"] = state[f"{path}.num_batches_tracked"]
    pruned.load_state_dict(cut)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        expected, found = whole(images), pruned(images)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@needs_torch_pruning
def test_the_smallest_channels_are_removed_and_classes_and_images_stay():
    network = build_model("cifar/resnet8", 7, size=16).eval()
    weakest = 5
    with torch.no_grad():
        network.stage1[0].conv1.weight[weakest] *= 1e-3
        network.stage1[0].conv2.weight[:, weakest] *= 1e-3
        network.stage1[0].bn1.weight[weakest] = network.stage1[0].bn1.bias[weakest] = 0
    before = network.stage1[0].conv1.weight.clone()
    pruned = prune_channels(network, 0.4, size=16, architecture="cifar/resnet8")
    left = pruned.stage1[0].conv1.weight
    assert 0.5 < count_weights(pruned) / count_weights(network) <= 0.6
    kept_rows = [row for row in range(16) if any(torch.isin(each, before[row]).all() for each in left)]
    assert len(kept_rows) == left.shape[0] < 16
    assert weakest not in kept_rows
    assert pruned.stem[0].in_channels == 3
    assert pruned.head.out_features == 7
    assert torch.equal(network.stage1[0].conv1.weight, before)  # a copy was pruned


@needs_torch_pruning
@pytest.mark.parametrize(("architecture", "size"), [RESIDUAL, SEPARABLE])
def test_a_network_of_the_recorded_widths_takes_the_pruned_weights(architecture, size):
    whole = build_model(architecture, 5, size=size).eval()
    pruned = prune_channels(whole, 0.6, size=size, architecture=architecture)
    assert 0.25 < count_weights(pruned) / count_weights(whole) <= 0.4
    again = cut_channels(build_model(architecture, 5, size=size).eval(), describe_widths(whole, pruned))
    again.load_state_dict(pruned.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(images), pruned(images))


@needs_torch_pruning
def test_a_pruned_network_is_pruned_again():
    whole = build_model("cifar/resnet8", 5, size=16).eval()
    once = prune_channels(whole, 0.3, size=16, architecture="cifar/resnet8")
    twice = prune_channels(once, 0.3, size=16, architecture="cifar/resnet8")
    widths = describe_widths(whole, twice)
    assert count_weights(twice) <= 0.7 * count_weights(once)
    assert count_weights(cut_channels(whole, widths)) == count_weights(twice)


@needs_torch_pruning
@pytest.mark.parametrize(
    ("architecture", "size", "named"),
    [
        ("timm/convnext_atto", 32, "stem.1"),
        ("cifar/shufflenetv1", 32, "stage1."),
    ],
)
def test_a_layer_that_cannot_be_pruned_is_named(architecture, size, named):
    network = build_model(architecture, 5, size=size)
    with pytest.raises(UsageError, match=r"cannot be pruned") as raised:
        prune_channels(network, 0.5, size=size, architecture=architecture)
    assert named in str(raised.value)
    assert "fit" in str(raised.value)


@needs_torch_pruning
def test_a_share_that_cannot_be_reached_names_the_largest():
    network = build_model("cifar/resnet8", 5, size=16)
    with pytest.raises(UsageError, match=r"at most 9\d% can be removed"):
        prune_channels(network, 0.9999, size=16, architecture="cifar/resnet8")


@pytest.mark.parametrize(
    ("widths", "named"),
    [
        ({"stem.9": {"out_channels": 4}}, "stem.9"),
        ({"stem": {"out_channels": 4}}, "stem"),
        ({"stem.0": {"out_channels": 17}}, "from 1 to 16"),
        ({"stem.0": {"out_channels": 0}}, "from 1 to 16"),
        ({"stem.0": {"out_channels": True}}, "from 1 to 16"),
        ({"stem.0": {"kernel_size": 1}}, "kernel_size"),
        ({"stem.0": {}}, "stem.0"),
    ],
)
def test_wrong_widths_are_refused(widths, named):
    with pytest.raises(UsageError) as raised:
        cut_channels(build_model("cifar/resnet8", 5, size=16), widths)
    assert named in str(raised.value)
