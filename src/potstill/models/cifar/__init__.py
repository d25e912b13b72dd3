"""``cifar/NAME``: the small networks of the distillation literature, for images of about 32 px.

They are written from their papers.
"""

import re
from collections.abc import Callable

from torch import nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models.cifar.networks import (
    RESNET_WIDTHS_X4,
    VGG,
    FourStageResNet,
    MobileNetV2,
    ResNet,
    ShuffleNetV1,
    ShuffleNetV2,
    WideResNet,
)

# Name -> network for (num_classes, in_chans).
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda classes, chans: ResNet(8, classes, chans),
    "resnet14": lambda classes, chans: ResNet(14, classes, chans),
    "resnet20": lambda classes, chans: ResNet(20, classes, chans),
    "resnet32": lambda classes, chans: ResNet(32, classes, chans),
    "resnet44": lambda classes, chans: ResNet(44, classes, chans),
    "resnet56": lambda classes, chans: ResNet(56, classes, chans),
    "resnet110": lambda classes, chans: ResNet(110, classes, chans),
    "resnet20_a": lambda classes, chans: ResNet(20, classes, chans, shortcut="A"),
    "resnet32_a": lambda classes, chans: ResNet(32, classes, chans, shortcut="A"),
    "resnet44_a": lambda classes, chans: ResNet(44, classes, chans, shortcut="A"),
    "resnet56_a": lambda classes, chans: ResNet(56, classes, chans, shortcut="A"),
    "resnet110_a": lambda classes, chans: ResNet(110, classes, chans, shortcut="A"),
    "resnet8x4": lambda classes, chans: ResNet(8, classes, chans, RESNET_WIDTHS_X4),
    "resnet32x4": lambda classes, chans: ResNet(32, classes, chans, RESNET_WIDTHS_X4),
    "resnet18": lambda classes, chans: FourStageResNet(18, classes, chans),
    "resnet34": lambda classes, chans: FourStageResNet(34, classes, chans),
    "resnet50": lambda classes, chans: FourStageResNet(50, classes, chans),
    "wrn_16_1": lambda classes, chans: WideResNet(16, 1, classes, chans),
    "wrn_16_2": lambda classes, chans: WideResNet(16, 2, classes, chans),
    "wrn_28_10": lambda classes, chans: WideResNet(28, 10, classes, chans),
    "wrn_40_1": lambda classes, chans: WideResNet(40, 1, classes, chans),
    "wrn_40_2": lambda classes, chans: WideResNet(40, 2, classes, chans),
    "vgg8": lambda classes, chans: VGG(8, classes, chans),
    "vgg11": lambda classes, chans: VGG(11, classes, chans),
    "vgg13": lambda classes, chans: VGG(13, classes, chans),
    "vgg16": lambda classes, chans: VGG(16, classes, chans),
    "vgg19": lambda classes, chans: VGG(19, classes, chans),
    "mobilenetv2": lambda classes, chans: MobileNetV2(classes, chans),
    "shufflenetv1": lambda classes, chans: ShuffleNetV1(classes, chans),
    "shufflenetv2": lambda classes, chans: ShuffleNetV2(classes, chans),
}


def names() -> list[str]:
    return list(MODELS)


def is_model(name: str) -> bool:
    return name in MODELS or _parse_wide_resnet(name) is not None


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    wide = _parse_wide_resnet(name)
    return WideResNet(*wide, num_classes, in_chans) if wide else MODELS[name](num_classes, in_chans)


def own_size(name: str) -> int | None:
    return 32


def normalisation(name: str) -> tuple[Triple, Triple]:
    # They come without weights, so any is right; ImageNet's is what most teachers take, and then one serves both.
    return InputSpec.mean, InputSpec.std


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    raise UsageError(
        f"cifar/{name} has no published weights; leave weights out to train it from scratch,\n"
        "or name a file (.safetensors, .pth) that holds its state dict"
    )


def _parse_wide_resnet(name: str) -> tuple[int, int] | None:
    """Return depth and width of ``wrn_d_w``: any d = 6n + 4 of at least 10, any w of at least 1."""
    match = re.fullmatch(r"wrn_([1-9]\d{1,3})_([1-9]\d?)", name, re.ASCII)
    if match is None or int(match[1]) % 6 != 4:
        return None
    return int(match[1]), int(match[2])
