"""AdaBN against statistics that NumPy takes over all images, and against a slow second network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.models.factory import create_model
from potstill.training.averaging import adapt_batch_norm, batch_norm_layers, check_batch_norm
from potstill.types import Batch


def batches(images: torch.Tensor, sizes: list[int]) -> list[Batch]:
    return [Batch(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(sizes)]


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(22, 3, 8, 8) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.Flatten(), nn.Linear(80, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[22], [8, 8, 6], [20, 2], [2] * 11])
def test_a_first_layer_gets_mean_and_variance_over_all_images(images: torch.Tensor, sizes: list[int]) -> None:
    net = network()
    before = net[0](images).detach().double().numpy()
    assert adapt_batch_norm(net, batches(images, sizes)) == 22
    assert net[1].running_mean.numpy() == pytest.approx(before.mean(axis=(0, 2, 3)), rel=1e-5)
    assert net[1].running_var.numpy() == pytest.approx(before.var(axis=(0, 2, 3), ddof=1), rel=1e-5)


def test_later_layers_see_batches_normalised_by_themselves(images: torch.Tensor) -> None:
    """The slow reference: every layer by hand, batch by batch, dropout left out, statistics over what came in."""
    net = network()
    inputs: dict[int, list[np.ndarray]] = {1: [], 5: [], 8: []}
    with torch.no_grad():
        for part in images.split([10, 6, 6]):
            x = part
            for at, layer in enumerate(net):
                if at in inputs:
                    inputs[at].append(x.double().transpose(0, 1).flatten(1).numpy())
                    over = [0, *range(2, x.ndim)]
                    mean, var = x.mean(dim=over, keepdim=True), x.var(dim=over, unbiased=False, keepdim=True)
                    x = (x - mean) / (var + layer.eps).sqrt()
                elif not isinstance(layer, nn.Dropout):
                    x = layer(x)
    adapt_batch_norm(net, batches(images, [10, 6, 6]))
    for at, parts in inputs.items():
        seen = np.concatenate(parts, axis=1)
        assert net[at].running_mean.numpy() == pytest.approx(seen.mean(axis=1), rel=1e-4, abs=1e-5)
        assert net[at].running_var.numpy() == pytest.approx(seen.var(axis=1, ddof=1), rel=1e-4)


def test_weights_modes_and_settings_stay_as_they_are(images: torch.Tensor) -> None:
    net = network().train()
    net[4].eval()
    net[5].momentum = None
    net[8].weight.data.fill_(2.0)
    before = copy.deepcopy(net)
    adapt_batch_norm(net, batches(images, [11, 11]))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved == {
        f"{at}.{what}" for at in (1, 5, 8) for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [module.training for module in net.modules()] == [module.training for module in before.modules()]
    assert (net[1].momentum, net[5].momentum) == (0.1, None)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_twice_is_the_same_as_once(images: torch.Tensor) -> None:
    """Nothing of the old statistics is left in the new ones."""
    once, twice = network(), network()
    twice[1].running_mean.fill_(100.0)
    adapt_batch_norm(twice, batches(images, [22]))
    for net in (once, twice):
        adapt_batch_norm(net, batches(images, [8, 14]))
    for name, value in once.state_dict().items():
        assert name.endswith("tracked") or torch.equal(value, twice.state_dict()[name]), name


def test_large_offsets_do_not_cancel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3))
    images = torch.randn(40, 3, 4, 4) * 0.01 + 1000
    adapt_batch_norm(net, batches(images, [20, 20]))
    assert net[0].running_var.numpy() == pytest.approx(images.double().var(dim=(0, 2, 3)).numpy(), rel=1e-4)


def test_networks_without_batch_norm_are_refused() -> None:
    vit = create_model("timm/vit_tiny_patch16_224", 3, size=32)
    with pytest.raises(UsageError, match=r"adapt_batch_norm: teacher vit has no BatchNorm.*leave it out"):
        check_batch_norm(vit, "teacher vit")
    resnet = create_model("resnet18", 3, size=32)
    check_batch_norm(resnet, "teacher")
    assert len(batch_norm_layers(resnet)) == 20
    assert batch_norm_layers(nn.BatchNorm2d(3, track_running_stats=False)) == []


def test_one_value_per_channel_is_no_statistic() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    with pytest.raises(UsageError, match="two images or more"):
        adapt_batch_norm(net, batches(torch.randn(1, 3, 2, 2), [1]))
    assert net[1].momentum == 0.1
