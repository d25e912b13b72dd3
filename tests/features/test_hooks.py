"""What is read is what the network computed, whatever the network does to it afterwards."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from potstill.errors import UsageError
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import Stage, find_stages
from potstill.features.tracing import Grid
from potstill.models.factory import create_model

from .odd_networks import Plain, Residual, Shared


def images(size: int, batch: int = 2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


ENDS_IN_RELU = {
    "timm resnet18": (lambda: timm.create_model("resnet18"), 64),
    "timm resnetv2": (lambda: timm.create_model("resnetv2_50", layers=(1, 1, 1, 1)), 64),
    "timm regnety": (lambda: timm.create_model("regnety_002"), 64),
    "timm vgg11_bn": (lambda: timm.create_model("vgg11_bn", mlp_ratio=1 / 64), 64),
    "torchvision resnet18": (torchvision.models.resnet18, 64),
    "cifar resnet": (lambda: create_model("cifar/resnet8", 10, size=32), 32),
    "cifar vgg": (lambda: create_model("cifar/vgg8", 10, size=32), 32),
    "functions": (Plain, 16),
    "one module for all": (Shared, 16),
    "writes into its sums": (Residual, 16),
}


@pytest.mark.parametrize("name", ENDS_IN_RELU)
@pytest.mark.parametrize("training", [True, False])
def test_relu_of_the_map_before_activation_is_the_map(name, training):
    """Whether the activation is a module or a function, of its own or shared, in place or not."""
    torch.manual_seed(0)
    make, size = ENDS_IN_RELU[name]
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)  # timm starts with zeros, so that a block's sum is its shortcut
    structure = find_stages(network, images(size))
    network.train(training)
    plain = copy.deepcopy(network)
    with (
        capture_features(network, FeatureRequest(structure.stages)) as after,
        capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as before,
    ):
        logits = network(images(size))
    torch.testing.assert_close(logits, plain(images(size)), rtol=0, atol=0)  # reading changes nothing
    for stage, activated, raw in zip(structure.stages, after.maps, before.maps, strict=True):
        if stage.before == "activation" and stage.activation != stage.path and "resnetv2" in name:
            assert raw.shape == activated.shape  # here the next block activates: tested below
            continue
        assert (raw < 0).any(), stage.path
        assert torch.equal(F.relu(raw), activated), stage.path


def test_a_wide_residual_network_normalises_at_the_start_of_the_next_block():
    network = create_model("cifar/wrn_16_2", 10, size=32).eval()
    structure = find_stages(network, images(32))
    with torch.no_grad(), capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as before:
        network(images(32))
        first = network.stage1(network.stem(images(32)))
        second = network.stage2(first)
    assert torch.equal(before.maps[0], network.stage2[0].bn1(first))
    assert torch.equal(before.maps[1], network.stage3[0].bn1(second))
    assert torch.equal(before.maps[2], network.bn(network.stage3(second)))


def test_timms_batchnorm_that_activates_itself():
    network = timm.create_model("resnetv2_50", layers=(1, 1, 1, 1)).eval()
    structure = find_stages(network, images(64))
    with torch.no_grad(), capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as before:
        network(images(64))
        norm = network.stages[1].blocks[0].norm1
        summed = network.stages[0](network.stem(images(64)))
    norm.act = nn.Identity()
    assert torch.equal(before.maps[0], norm(summed))


def test_without_an_activation_the_map_is_its_own_form_before_it():
    network = timm.create_model("convnext_atto").eval()
    structure = find_stages(network, images(64))
    with (
        capture_features(network, FeatureRequest(structure.stages)) as after,
        capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as before,
    ):
        network(images(64))
    assert all(torch.equal(*both) for both in zip(after.maps, before.maps, strict=True))


def test_a_map_that_the_network_overwrites_is_copied():
    """Densenet activates its last BatchNorm in place: without a copy, its output would be read activated."""
    network = torchvision.models.densenet121().eval()
    structure = find_stages(network, images(64))
    assert [stage.copied_before for stage in structure.stages] == [True] * 4
    with torch.no_grad():
        expected = network.features(images(64))
        with (
            capture_features(network, FeatureRequest(structure.stages[-1:])) as after,
            capture_features(network, FeatureRequest(structure.stages[-1:], before_activation=True)) as before,
        ):
            network(images(64))
    assert torch.equal(before.maps[0], expected)
    assert torch.equal(after.maps[0], F.relu(expected))


def test_the_embedding_is_what_the_head_reads():
    network = torchvision.models.resnet18(num_classes=7).eval()
    structure = find_stages(network, images(64))
    with capture_features(network, FeatureRequest(structure.stages[-1:], embedding=structure.embedder)) as reading:
        logits = network(images(64))
    torch.testing.assert_close(network.fc(reading.embedding), logits, rtol=0, atol=0)
    torch.testing.assert_close(reading.embedding, reading.maps[0].mean(dim=(2, 3)))


def test_deit_gives_the_class_token_as_its_embedding():
    network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=7).eval()
    structure = find_stages(network, images(64))
    with torch.no_grad(), capture_features(network, FeatureRequest(embedding=structure.embedder)) as reading:
        logits = network(images(64))
        tokens = network.forward_features(images(64))
    torch.testing.assert_close(reading.embedding, tokens[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(logits, (network.head(tokens[:, 0]) + network.head_dist(tokens[:, 1])) / 2)


def test_gradients_flow_through_everything_that_is_read():
    network = Residual().train()
    structure = find_stages(network, images(16))
    with (
        capture_features(network, FeatureRequest(structure.stages, embedding=structure.embedder)) as after,
        capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as before,
    ):
        network(images(16))
    for tensor in (*after.maps, *before.maps, after.embedding):
        (gradient,) = torch.autograd.grad(tensor.square().sum(), network.body.stem[0].weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_under_autocast_and_without_gradients():
    network = torchvision.models.resnet18().eval()
    structure = find_stages(network, images(64))
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        capture_features(network, FeatureRequest(structure.stages, before_activation=True)) as reading,
    ):
        network(images(64))
    assert all(one.dtype == torch.bfloat16 for one in reading.maps)
    with torch.inference_mode():
        assert find_stages(network, images(64)) == structure


def test_each_forward_pass_is_read_anew():
    network = Shared().eval()
    structure = find_stages(network, images(16))
    with capture_features(network, FeatureRequest(structure.stages)) as reading:
        network(images(16))
        first = reading.maps
        network(images(16, batch=5))
    assert [len(one) for one in first] == [2, 2]
    assert [len(one) for one in reading.maps] == [5, 5]


def test_a_stage_that_is_not_reached_is_said():
    class Lazy(Shared):
        def forward(self, images):
            return super().forward(images) if images.shape[2] == 16 else self.head(torch.zeros(1, 12))

    network = Lazy()
    structure = find_stages(network, images(16))
    with capture_features(network, FeatureRequest(structure.stages)) as reading:
        network(images(16))
        network(images(8))
    with pytest.raises(UsageError, match=r"did not come to 'relu\[0\]'"):
        _ = reading.maps


def test_hooks_are_gone_even_when_the_network_raises():
    network = Plain()
    structure = find_stages(network, images(16))
    request = FeatureRequest(structure.stages, embedding=structure.embedder, taps=("conv1",))
    with pytest.raises(RuntimeError), capture_features(network, request):
        network(images(24))
    with (
        pytest.raises(UsageError, match="no layer 'conv9'"),
        capture_features(network, FeatureRequest(structure.stages, taps=("conv9",))),
    ):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    copy.deepcopy(network)


def test_named_layers_are_read_beside_the_stages():
    network = Plain()
    with capture_features(network, FeatureRequest(taps=("fc1",))) as reading:
        network(images(16))
    assert reading.features["fc1"].shape == (2, 20)
    assert reading.maps == ()


# layouts


def test_channels_last_and_tokens_become_maps():
    last = torch.arange(24.0).reshape(1, 2, 3, 4)  # 2 x 3 places of 4 channels
    found = Grid("NHWC", 4, 2, 3).to_map(last)
    assert found.shape == (1, 4, 2, 3)
    assert found[0, 1, 1, 2] == last[0, 1, 2, 1] == 21
    tokens = torch.cat([torch.full((1, 2, 4), -1.0), last.reshape(1, 6, 4)], dim=1)
    assert torch.equal(Grid("tokens", 4, 2, 3, prefix=2).to_map(tokens), found)


def test_tokens_of_images_of_another_size():
    found = Grid("tokens", 4, 4, 4, prefix=1).to_map(torch.zeros(1, 1 + 36, 4))
    assert found.shape == (1, 4, 6, 6)
    with pytest.raises(UsageError, match="7 tokens do not fill a grid like 4 x 4"):
        Grid("tokens", 4, 4, 4).to_map(torch.zeros(1, 7, 4))


def test_swins_maps_are_those_of_its_layers_with_channels_first():
    network = timm.create_model("swin_tiny_patch4_window7_224", img_size=64).eval()
    structure = find_stages(network, images(64))
    with torch.no_grad(), capture_features(network, FeatureRequest(structure.stages, taps=("layers.1",))) as reading:
        network(images(64))
    assert reading.features["layers.1"].shape == (2, 8, 8, 192)
    assert torch.equal(reading.maps[1], reading.features["layers.1"].permute(0, 3, 1, 2))


def test_a_stage_is_hashable_and_compared_by_value():
    assert len({Stage("a", 1, 2, 2, "NCHW"), Stage("a", 1, 2, 2, "NCHW")}) == 1
