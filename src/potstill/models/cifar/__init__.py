"""``cifar/NAME``: the small networks of the distillation literature, for images of about 32 px.

They are written from their papers.
"""

import re
from collections.abc import Callable

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple
from potstill.models.cifar.mobile import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from potstill.models.cifar.resnet import RESNET_WIDTHS_X4, FourStageResNet, ResNet, WideResNet

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


VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {  # in each of the five stages
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """VGG for 32 px images: BatchNorm after each convolution, and one linear head in place of three.

    Five stages of 3x3 convolutions with 2x2 max pooling between them, global average pooling, a linear head.

    The last stage sees 4x4 maps at 32 px as in the distillation literature: the fourth pooling is left out below
    64 px.  Needs at least 8 px.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1.
    https://arxiv.org/abs/1409.1556  (VGG8, one convolution a stage, comes from the distillation literature.)

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: K.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        inputs = (in_chans, *VGG_CHANNELS)
        stages = [_stage(inputs[i], VGG_CHANNELS[i], VGG_CONVOLUTIONS[depth][i]) for i in range(5)]
        self.stage1, self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(VGG_CHANNELS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        x = self.pool(self.stage1(images))
        x = self.pool(self.stage2(x))
        x = self.stage4(self.pool(self.stage3(x)))
        if images.shape[-1] >= 64:
            x = self.pool(x)
        logits: Tensor = self.head(self.stage5(x).mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        convolution = nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
