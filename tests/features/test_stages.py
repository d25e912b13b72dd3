"""Anatomy against timm's own account of its networks, torchvision's modules, and networks written by hand."""

import copy
import itertools

import pytest
import timm
import torch
import torchvision
from torch import nn

from potstill.errors import UsageError
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import find_stage_at, find_stages
from potstill.models.factory import create_model

from .odd_networks import Plain, Pooled, Residual, Shared


def images(size: int, batch: int = 2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def paths(structure) -> list[str]:
    return [stage.path for stage in structure.stages]


def shapes(structure) -> list[tuple[int, int, int]]:
    return [(stage.channels, stage.height, stage.width) for stage in structure.stages]


# name, paths, whether the head reads the mean of the last map, length of the embedding
TIMM = {
    "resnet18": (["layer1", "layer2", "layer3", "layer4"], True, 512),
    "vgg11_bn": (["features.2", "features.6", "features.13", "features.20", "features.27"], False, 4096),
    "mobilenetv3_small_100": (["blocks.0", "blocks.1", "blocks.3", "blocks.5"], False, 1024),
    "efficientnet_lite0": (["blocks.0", "blocks.1", "blocks.2", "blocks.4", "bn2"], True, 1280),
    "regnety_002": (["s1", "s2", "s3", "s4"], True, 368),
    "convnext_atto": (["stages.0", "stages.1", "stages.2", "stages.3"], False, 320),
    "vit_tiny_patch16_224": (["blocks.2", "blocks.5", "blocks.8", "blocks.11"], False, 192),
    "deit_tiny_distilled_patch16_224": (["blocks.2", "blocks.5", "blocks.8", "blocks.11"], False, 192),
    "swin_tiny_patch4_window7_224": (["layers.0", "layers.1", "layers.2", "norm"], True, 768),
    "swin_s3_tiny_224": (["layers.0", "layers.1", "layers.2", "norm"], True, 768),
    "mobilevit_xxs": (["stages.0", "stages.1", "stages.2", "stages.3", "final_conv"], True, 320),
}
TAKES_SIZE = ("vit", "deit", "swin")


@pytest.fixture(scope="module", params=TIMM)
def timm_network(request):
    torch.manual_seed(0)
    name = request.param
    options = {"img_size": 64} if name.startswith(TAKES_SIZE) else {}
    if name.startswith("vgg"):
        options["mlp_ratio"] = 1 / 64  # a head of 2 million weights in place of 120
    return name, timm.create_model(name, num_classes=7, **options).train()


def test_stages_of_timm_networks(timm_network):
    name, network = timm_network
    expected_paths, pooled, embedding = TIMM[name]
    structure = find_stages(network, images(64))
    assert paths(structure) == expected_paths
    assert structure.pooled == pooled
    assert structure.embedding == embedding
    assert structure.head == (None if "distilled" in name else _classifier(network))
    assert structure.embedder == _classifier(network)  # of DeiT's two heads the first
    prefix = {"vit": 1, "deit": 2}.get(name.split("_")[0], 0)
    assert {stage.prefix for stage in structure.stages} == {prefix}


def _classifier(network) -> str:
    classifier = network.pretrained_cfg["classifier"]
    return classifier if isinstance(classifier, str) else classifier[0]


def test_maps_are_those_of_timm(timm_network):
    """Equal values, not only shapes; of the last layer where the head reads that of timm's ``forward_features``."""
    name, network = timm_network
    network.eval()
    with torch.no_grad():
        if hasattr(network, "forward_intermediates"):
            theirs = network.forward_intermediates(images(64), intermediates_only=True, output_fmt="NCHW")
        else:  # VGG of timm 1.0.28: layers in a row
            theirs = list(itertools.accumulate(network.features, lambda x, layer: layer(x), initial=images(64)))
        final = network.forward_features(images(64))
        if name.startswith("swin"):
            final = final.permute(0, 3, 1, 2)
        structure = find_stages(network, images(64))
        with capture_features(network, FeatureRequest(structure.stages)) as reading:
            network(images(64))
    network.train()
    own = theirs if "vit" in name or "deit" in name else [*theirs, final]
    for found, stage in zip(reading.maps, structure.stages, strict=True):
        assert any(found.shape == one.shape and torch.equal(found, one) for one in own), stage.path


def test_leaves_the_network_as_it_was(timm_network):
    _, network = timm_network
    network.train()
    next(network.children()).eval()  # somebody froze a part
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    before = torch.get_rng_state()
    find_stages(network, images(64))
    find_stages(network, torch.zeros(2, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    copy.deepcopy(network)


def test_a_black_example_shows_the_same(timm_network):
    _, network = timm_network
    assert find_stages(network, torch.zeros(1, 3, 64, 64)) == find_stages(network, images(64, 3))


TORCHVISION = {
    "resnet18": (["layer1", "layer2", "layer3", "layer4"], "fc", True),
    "mobilenet_v2": (["features.1", "features.3", "features.6", "features.13", "features.18"], "classifier.1", True),
    "swin_t": (["features.1", "features.3", "features.5", "norm"], "head", True),
    "alexnet": (["features.1", "features.4", "features.11"], "classifier.6", False),
    "densenet121": (
        ["features.denseblock1", "features.denseblock2", "features.denseblock3", "act(features)"],
        "classifier",
        True,
    ),
    "squeezenet1_1": (["features.4", "features.7", "features.12"], None, False),  # a convolution gives its logits
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_stages_of_torchvision_networks(name):
    structure = find_stages(torchvision.models.get_model(name, num_classes=7), images(64))
    assert (paths(structure), structure.head, structure.pooled) == TORCHVISION[name]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cifar/resnet8", 32, [("stage1", 16, 32), ("stage2", 32, 16), ("stage3", 64, 8)]),
        ("cifar/resnet8x4", 32, [("stage1", 64, 32), ("stage2", 128, 16), ("stage3", 256, 8)]),
        ("cifar/resnet8x4", 64, [("stage1", 64, 64), ("stage2", 128, 32), ("stage3", 256, 16)]),  # channels = pixels
        ("cifar/vgg8", 32, [("stage1", 64, 32), ("stage2", 128, 16), ("stage3", 256, 8), ("stage5", 512, 4)]),
        ("timm/resnet18", 32, [("layer1", 64, 8), ("layer2", 128, 4), ("layer3", 256, 2), ("layer4", 512, 1)]),
        ("timm/resnet26d", 64, [("layer1", 256, 16), ("layer2", 512, 8), ("layer3", 1024, 4), ("layer4", 2048, 2)]),
    ],
)
def test_stages_at_small_sizes(name, size, expected):
    structure = find_stages(create_model(name, 10, size=size), images(size))
    assert [(stage.path, stage.channels, stage.height) for stage in structure.stages] == expected
    assert structure.pooled


def test_a_wide_residual_network_ends_behind_its_last_activation():
    """Its blocks put out bare sums; what the head averages is activated after them."""
    network = create_model("cifar/wrn_16_2", 10, size=32)
    structure = find_stages(network, images(32))
    assert shapes(structure) == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert structure.pooled
    assert [stage.norm for stage in structure.stages] == ["stage2.0.bn1", "stage3.0.bn1", "bn"]


@pytest.mark.parametrize(
    ("network", "expected", "pooled"),
    [
        (Plain(), [("act(conv1)", 8, 16), ("act(conv2)", 12, 8)], False),
        (Shared(), [("relu[0]", 8, 16), ("relu[1]", 12, 8)], True),
        (Residual(), [("body.blocks.0", 8, 4), ("body.blocks.1", 16, 2), ("body.blocks.2", 32, 1)], True),
        (Pooled(), [("block1.1", 8, 16), ("block2.1", 12, 8)], False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_stages_of_networks_by_hand(network, expected, pooled):
    structure = find_stages(network, images(16))
    assert [(stage.path, stage.channels, stage.height) for stage in structure.stages] == expected
    assert structure.pooled == pooled


def test_a_last_layer_norm_counts_only_where_the_head_averages_it():
    options = {"num_classes": 7, "img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 1, 1)}
    swin = timm.models.swin_transformer.SwinTransformer(**options)
    assert paths(find_stages(swin, images(64)))[-1] == "norm"
    swin.reset_classifier(7, "max")
    assert paths(find_stages(swin, images(64)))[-1] == "layers.3"


def test_batchnorm_of_the_blocks_own_path_not_of_its_shortcut():
    resnet = find_stages(torchvision.models.resnet18(), images(64))  # one shortcut of three stages is called last
    assert [stage.norm for stage in resnet.stages] == [f"layer{i}.1.bn2" for i in range(1, 5)]
    small = find_stages(create_model("cifar/resnet8", 10, size=32), images(32))  # the only block of each stage has one
    assert [stage.norm for stage in small.stages] == [f"stage{i}.0.bn2" for i in range(1, 4)]
    regnet = find_stages(timm.create_model("regnety_002"), images(64))
    assert regnet.stages[0].norm == "s1.b1.conv3.bn"
    assert [stage.norm for stage in find_stages(timm.create_model("convnext_atto"), images(64)).stages] == [None] * 4
    assert [stage.norm for stage in find_stages(Residual(), images(16)).stages][-1] == "body.blocks.2.bn2"


def test_images_need_not_be_square():
    example = torch.randn(2, 3, 64, 128)
    structure = find_stages(torchvision.models.resnet18(), example)
    assert shapes(structure) == [(64, 16, 32), (128, 8, 16), (256, 4, 8), (512, 2, 4)]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(64, 128))
    assert shapes(find_stages(vit, example)) == [(192, 4, 8)] * 4


def test_a_wrapper_changes_nothing_but_the_paths():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torchvision.models.resnet18(num_classes=7)

        def forward(self, images):
            return self.inner(images).double()

    structure = find_stages(Wrapper(), images(64))
    assert paths(structure) == ["inner.layer1", "inner.layer2", "inner.layer3", "inner.layer4"]
    assert (structure.head, structure.pooled) == ("inner.fc", True)


def test_the_mean_is_told_from_other_poolings():
    network = torchvision.models.resnet18()
    network.avgpool = nn.AdaptiveMaxPool2d(1)
    assert not find_stages(network, images(64)).pooled


# by path


def test_a_stage_of_ones_own_choice():
    network = timm.create_model("resnet18")
    stage = find_stage_at(network, images(64), "layer2.0")
    assert (stage.channels, stage.height, stage.norm, stage.activation) == (128, 8, "layer2.0.bn2", "layer2.0.act2")
    assert find_stage_at(network, images(64), "layer3") == find_stages(network, images(64)).stages[2]
    assert find_stage_at(Shared(), images(16), "relu[0]") == find_stages(Shared(), images(16)).stages[0]
    assert find_stage_at(Shared(), images(16), "relu").height == 8
    assert find_stage_at(Plain(), images(16), "act(conv2)").before == "output"
    assert find_stage_at(Plain(), images(16), "conv2").before == "map"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layer5", r"ResNet has no layer 'layer5'; did you mean 'layer\d'"),
        ("fc", r"output of 'fc' is of shape \[2, 1000\], no feature map"),
        ("", "has no layer ''"),
    ],
)
def test_paths_that_cannot_be_stages(path, message):
    with pytest.raises(UsageError, match=message):
        find_stage_at(torchvision.models.resnet18(), images(64), path)


def test_a_layer_that_is_never_used():
    network = Plain()
    network.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(UsageError, match="does not use its layer 'spare'"):
        find_stage_at(network, images(16), "spare")


def test_hooks_are_gone_when_the_network_raises():
    network = Plain()
    with pytest.raises(RuntimeError):
        find_stages(network, images(24))  # the linear layer wants 16 px
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.training
