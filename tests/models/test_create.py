"""Networks by name: sizes against the published figures, shapes, and what is said where a name or size is wrong."""

import warnings

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from potstill.errors import UsageError
from potstill.models.factory import create_model
from potstill.models.registry import check_model, input_spec, list_models


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("resnet56", 100, 0.86),  # tables of the distillation literature
        ("resnet8x4", 100, 1.23),
        ("resnet32x4", 100, 7.43),
        ("wrn_16_2", 100, 0.70),
        ("wrn_40_1", 100, 0.57),
        ("wrn_40_2", 100, 2.26),
        ("wrn_28_10", 10, 36.5),  # Zagoruyko and Komodakis 2016, table 4
        ("vgg8", 100, 3.97),
        ("vgg13", 100, 9.46),
    ],
)
def test_parameters_are_those_of_the_literature(name, classes, millions):
    digits = 1 if millions > 30 else 2
    assert round(parameters(create_model(f"cifar/{name}", classes, size=32)) / 1e6, digits) == millions


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)])
def test_residual_networks_are_those_of_he_et_al_but_for_two_projections(depth, millions):
    # table 6 of the paper, for 10 classes and shortcuts without weights (110 layers: "1.7M")
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert round((parameters(create_model(f"cifar/resnet{depth}", 10, size=32)) - projections) / 1e6, 2) == millions


def test_convolutions_of_a_wide_network_of_any_depth_and_width():
    network = create_model("cifar/wrn_22_3", 5, size=32)
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    # the stem, 3 stages of (22 - 4) / 6 = 3 blocks of two convolutions, and 3 shortcuts where the width changes
    assert (kernels.count((3, 3)), kernels.count((1, 1))) == (1 + 3 * 3 * 2, 3)
    assert network.head.in_features == 3 * 64


def test_wide_blocks_activate_before_they_branch():
    network = create_model("cifar/wrn_16_2", 5, size=32).eval()  # fresh BatchNorm changes nothing in eval mode
    below_zero = torch.full((1, 16, 8, 8), -1.0)
    with torch.no_grad():
        assert network.stage1[0](below_zero).eq(0).all()  # a new shape: both branches see ReLU(-1) = 0
        assert network.stage1[1](below_zero.repeat(1, 2, 1, 1)).eq(-1).all()  # else the input itself is added


@pytest.mark.parametrize(("stage", "inputs"), [("stage1", 16), ("stage2", 16)])
def test_residual_blocks_are_torchvisions_basic_blocks(stage, inputs):
    block = create_model("cifar/resnet8", 5, size=32).get_submodule(f"{stage}.0").eval()
    outputs, stride = block.conv1.out_channels, block.conv1.stride[0]
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    reference = BasicBlock(inputs, outputs, stride, shortcut).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), block.state_dict().values(), strict=True)))
    images = torch.randn(2, inputs, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(images), reference(images))


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn_16_2", "vgg8", "vgg16"])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_small_networks_take_small_images(name, size):
    network = create_model(f"cifar/{name}", 7, size=size)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_last_vgg_stage_sees_4x4_maps_at_32_and_64_px():
    network = create_model("cifar/vgg8", 3, size=32)
    seen = []
    network.stage5.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    for size in (32, 64):
        network(torch.randn(2, 3, size, size))
    assert seen == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        # torchvision documents 11,689,512 and 5,717,416 parameters with 1000 classes.
        ("resnet18", 32, 11_689_512 - 990 * 513),
        ("torchvision/resnet18", 64, 11_689_512 - 990 * 513),
        ("timm/vit_tiny_patch16_224", 64, 5_717_416 - 990 * 193 - (14**2 - 4**2) * 192),
    ],
)
def test_large_networks_at_small_sizes(name, size, count):
    network = create_model(name, 10, size=size)
    assert network.training
    assert network(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert parameters(network) == count


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "torchvision/swin_t", "torchvision/googlenet"],
)
def test_training_mode_gives_plain_logits_at_64_px(name):
    assert create_model(name, 3, size=64).train()(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_torchvision_inception_gives_plain_logits_in_training():
    assert create_model("torchvision/inception_v3", 3, size=75)(torch.randn(2, 3, 75, 75)).shape == (2, 3)


def test_both_vgg16_are_one_function_at_small_sizes():
    theirs = create_model("torchvision/vgg16", 7, size=32).eval()
    with torch.device("meta"):  # half a gigabyte of weights is enough
        ours = create_model("vgg16", 7, size=32).eval()
    own, values = ours.state_dict(), theirs.state_dict().values()
    # the same layers in the same order; timm's head holds its linear layers as convolutions
    same = {key: value.reshape(own[key].shape) for key, value in zip(own, values, strict=True)}
    ours.load_state_dict(same, assign=True)
    with torch.no_grad():
        for size in (32, 64):
            images = torch.randn(1, 3, size, size)
            logits = ours(images)
            assert logits.shape == (1, 7)
            torch.testing.assert_close(logits, theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/mobilenet_v2", "cifar/wrn_16_1", "cifar/vgg8"])
def test_other_channels(name):
    assert create_model(name, 3, size=32, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_global_seed_decides_the_weights_and_nothing_else_is_drawn():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_model("cifar/resnet8", 3, size=32).state_dict())
    assert torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_the_trial_leaves_batch_norm_alone():
    state = create_model("cifar/resnet8", 3, size=32).state_dict()
    assert state["stem.1.running_mean"].eq(0).all()
    assert state["stem.1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet81", "'timm/resnet18'"),
        ("resnt8x4", "did you mean 'cifar/resnet8x4'"),
        ("resnet8x4", "did you mean 'cifar/resnet8x4'"),
        ("torchvision/resnet19", "did you mean 'torchvision/resnet18'"),
        ("cifar/wrn_15_2", "'cifar/wrn_16_2'"),
        ("cifra/vgg8", "did you mean 'cifar/vgg8'"),
        ("efficientnet-lite", "'efficientnet-lite"),
        ("resnet18.no_such_weights", "'timm/resnet18'"),
        ("zebra", "potstill models PATTERN"),
        ("", "potstill models PATTERN"),
        ("torchvision/fasterrcnn_resnet50_fpn", "no model"),
        ("torchvision/fcn_resnet50", "no model"),
        ("hf-hub:timm/resnet18", "no model"),
        ("timm/local-dir:somewhere", "no model"),
        ("cifar/wrn_16_0", "no model"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, suggestion):
    with pytest.raises(UsageError, match="no model") as error:
        check_model(name)
    assert suggestion in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/inception_v3", 64),
        ("torchvision/maxvit_t", 64),
        ("torchvision/alexnet", 32),
        ("torchvision/vit_b_32", 40),
        ("timm/inception_v3", 64),
        ("cifar/vgg8", 4),
    ],
)
def test_sizes_that_a_network_cannot_take_are_explained(name, size):
    with pytest.raises(UsageError, match=rf"{name} cannot take images of {size} px .*\n.*designed for \d+ px"):
        create_model(name, 3, size=size)


def test_one_class_is_no_classifier():
    with pytest.raises(UsageError, match="at least 2 classes, got num_classes=1"):
        create_model("cifar/vgg8", 1)


def test_list():
    names = list_models()
    assert {"timm/resnet18", "torchvision/vgg16", "cifar/resnet8x4", "efficientnet-lite0"} <= set(names)
    assert len(names) == len(set(names)) > 1000
    assert not [name for name in names if "fasterrcnn" in name or "quantized" in name]
    assert list_models("cifar/vgg") == [f"cifar/vgg{depth}" for depth in (8, 11, 13, 16, 19)]
    assert "torchvision/resnet18" in list_models("resnet1?")
    for name in list_models("cifar/") + list_models("torchvision/")[::20]:
        check_model(name)


def test_input_spec_takes_the_networks_own_normalisation():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for name, expected in {
        "resnet18": imagenet,
        "torchvision/vgg16": imagenet,
        "cifar/vgg8": imagenet,
        "vit_tiny_patch16_224": half,
        "efficientnet-lite0": half,
    }.items():
        spec = input_spec(name, 48, resize_mode="stretch")
        assert (spec.size, spec.mean, spec.std, spec.resize_mode) == (48, *expected, "stretch")


def test_creating_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("torchvision/googlenet", "timm/resnet18", "cifar/resnet8"):
            create_model(name, 3, size=64)
