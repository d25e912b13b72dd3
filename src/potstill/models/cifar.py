"""``cifar/NAME``: the small networks of the distillation literature, for images of about 32 px.

They are written from their papers.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (``ResNet``) and table 1
(``FourStageResNet``).  https://arxiv.org/abs/1512.03385
Four stages: the stem is one 3x3 convolution without pooling, so that the stages see 32, 16, 8 and 4 pixels.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.  https://arxiv.org/abs/1605.07146

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1.
https://arxiv.org/abs/1409.1556  (VGG8, one convolution a stage, comes from the distillation literature.)

Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
https://arxiv.org/abs/1801.04381
Half the paper's width, of five strides the second is left out (so the last maps are 2x2), ReLU stands for ReLU6, and
the first block has a 1x1 expansion although it does not widen.

Zhang, Zhou, Lin and Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, table 1 with three groups.  https://arxiv.org/abs/1707.01083

Ma, Zhang, Zheng and Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
table 5 at 1x.  https://arxiv.org/abs/1807.11164
Both ShuffleNets: the stem is a 1x1 convolution without stride or pooling, so that the three stages see 16, 8 and 4
pixels.  Weights start as torch draws them, as in the released networks.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple

RESNET_WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
RESNET_WIDTHS_X4 = (32, 64, 128, 256)  # the x4 networks of the distillation literature (resnet8x4, resnet32x4)


class ResNet(nn.Module):
    """``6n + 2`` layers: a 3x3 stem, three stages of n blocks, global average pooling, one linear head.

    Where a block changes shape, its shortcut is a 1x1 convolution with BatchNorm (option B of the paper), as in all
    published tables of distillation.  The paper's own CIFAR networks have no weights there (option A): every second
    pixel of the input, with channels of zeros added, half of them before and half behind its own.

    ``depth`` is any ``6n + 2``, ``widths`` the channels of the stem and of the three stages.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_chans: int = 3,
        widths: tuple[int, ...] = RESNET_WIDTHS,
        shortcut: Literal["A", "B"] = "B",
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.stage1 = _basic_stage(stem, stages[0], blocks, stride=1, option=shortcut)
        self.stage2 = _basic_stage(stages[0], stages[1], blocks, stride=2, option=shortcut)
        self.stage3 = _basic_stage(stages[1], stages[2], blocks, stride=2, option=shortcut)
        self.head = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                _ZeroPadding(stride, (outputs - inputs) // 2)
                if option == "A"
                else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class _ZeroPadding(nn.Module):
    """Every ``stride``-th pixel, with ``added`` channels of zeros on both sides."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.added = stride, added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))


def _basic_stage(inputs: int, outputs: int, blocks: int, stride: int, option: str = "B") -> nn.Sequential:
    first = _BasicBlock(inputs, outputs, stride, option)
    return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1, option) for _ in range(blocks - 1)))


FOUR_STAGE_BLOCKS = {  # in each of the four stages
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
FOUR_STAGE_WIDTHS = (64, 128, 256, 512)  # inside the blocks; bottlenecks put out four times as many
_EXPANSION = 4
_FIRST_WITH_BOTTLENECKS = 50


class FourStageResNet(nn.Module):
    """A 3x3 stem, four stages of residual blocks, global average pooling, one linear head.

    Blocks of two 3x3 convolutions up to ``depth`` 34; bottlenecks in 50, 101 and 152.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        bottlenecks = depth >= _FIRST_WITH_BOTTLENECKS
        build_stage = _bottleneck_stage if bottlenecks else _basic_stage
        inputs = (64, *((_EXPANSION if bottlenecks else 1) * width for width in FOUR_STAGE_WIDTHS))
        blocks = FOUR_STAGE_BLOCKS[depth]
        stages = [build_stage(inputs[i], FOUR_STAGE_WIDTHS[i], blocks[i], stride=1 if i == 0 else 2) for i in range(4)]
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.head = nn.Linear(inputs[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, 1x1 back; the 3x3 convolution has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(residual)) + self.shortcut(x))


def _bottleneck_stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(_Bottleneck(_EXPANSION * width, width, 1) for _ in range(blocks - 1)))


class WideResNet(nn.Module):
    """WRN-d-k: a 3x3 stem of 16 channels, three stages of ``(d - 4) / 6`` blocks, global average pooling, a head.

    BatchNorm and ReLU come before each convolution (table 1 of the paper); the shortcut of a block that changes shape
    is a 1x1 convolution of the activated input.  No dropout.

    ``depth`` is any ``6n + 4``, the stages have 16, 32 and 64 times ``width`` channels.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.stage1 = _wide_stage(16, 16 * width, blocks, stride=1)
        self.stage2 = _wide_stage(16 * width, 32 * width, blocks, stride=2)
        self.stage3 = _wide_stage(32 * width, 64 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()  # a layer, so that methods can put others behind the last map
        self.head = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.relu(self.bn(self.stage3(self.stage2(self.stage1(self.stem(images))))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _wide_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = _PreActivationBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(_PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {  # in each of the five stages
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """VGG for 32 px images: BatchNorm after each convolution, and one linear head behind global average pooling.

    Five stages of 3x3 convolutions with 2x2 max pooling between them, but the fourth below 64 px: the last stage sees
    4x4 maps at 32 px as in the distillation literature.  Needs at least 8 px.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        inputs = (in_chans, *VGG_CHANNELS)
        stages = [_vgg_stage(inputs[i], VGG_CHANNELS[i], VGG_CONVOLUTIONS[depth][i]) for i in range(5)]
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


def _vgg_stage(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        convolution = nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


# Of each row of table 2: expansion, channels at full width, blocks, stride of the first.
MOBILENET_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
MOBILENET_STAGES = ((0, 1), (2,), (3, 4), (5, 6))  # rows of one resolution: 16, 8, 4 and 2 pixels
_MOBILENET_STEM, _MOBILENET_LAST = 32, 1280  # the last convolution keeps its width in narrow networks


class MobileNetV2(nn.Module):
    """A 3x3 stem of stride 2, inverted residuals in four stages, a 1x1 convolution, global average pooling, a head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = _MOBILENET_STEM // 2  # half the paper's width
        self.stem = _mobilenet_convolution(in_chans, channels, 3, stride=2)
        stages = []
        for rows in MOBILENET_STAGES:
            blocks: list[nn.Module] = []
            for expansion, full, count, stride in (MOBILENET_ROWS[row] for row in rows):
                for position in range(count):
                    outputs = full // 2
                    blocks.append(_InvertedResidual(channels, outputs, stride if position == 0 else 1, expansion))
                    channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.last = _mobilenet_convolution(channels, _MOBILENET_LAST, 1)
        self.head = nn.Linear(_MOBILENET_LAST, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.last(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images))))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 on each by itself, 1x1 to few without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        linear: Tensor = self.bn3(self.conv3(inner))
        return x + linear if self.adds else linear


def _mobilenet_convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


SHUFFLENET_V1_CHANNELS = (240, 480, 960)  # for three groups
SHUFFLENET_V1_BLOCKS = (4, 8, 4)
SHUFFLENET_V1_GROUPS = 3
_SHUFFLENET_V1_STEM = 24


class ShuffleNetV1(nn.Module):
    """A 1x1 stem, three stages of shuffling units, global average pooling, one linear head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, _SHUFFLENET_V1_STEM, 1, bias=False), nn.BatchNorm2d(_SHUFFLENET_V1_STEM), nn.ReLU()
        )
        inputs = (_SHUFFLENET_V1_STEM, *SHUFFLENET_V1_CHANNELS)
        stages = [_shufflenet_v1_stage(inputs[i], SHUFFLENET_V1_CHANNELS[i], SHUFFLENET_V1_BLOCKS[i]) for i in range(3)]
        self.stage1, self.stage2, self.stage3 = stages
        self.head = nn.Linear(SHUFFLENET_V1_CHANNELS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _ShuffleV1Unit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 on each channel, grouped 1x1; stride 2 adds the averaged input as channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = outputs - inputs if stride == 2 else outputs
        inner = branch // 4
        # The few channels of the stem are not divided into groups (section 3.3).
        self.groups = 1 if inputs == _SHUFFLENET_V1_STEM else SHUFFLENET_V1_GROUPS
        self.conv1 = nn.Conv2d(inputs, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, branch, 1, groups=SHUFFLENET_V1_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        # The paper has no activation here; the released networks of the distillation literature have.
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(inner)))))
        if self.stride == 2:
            return F.relu(torch.cat([branch, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))
        return F.relu(branch + x)


def _shufflenet_v1_stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _ShuffleV1Unit(inputs, outputs, 2), *(_ShuffleV1Unit(outputs, outputs, 1) for _ in range(blocks - 1))
    )


SHUFFLENET_V2_CHANNELS = (116, 232, 464)
SHUFFLENET_V2_BLOCKS = (4, 8, 4)
_SHUFFLENET_V2_STEM, _SHUFFLENET_V2_LAST = 24, 1024


class ShuffleNetV2(nn.Module):
    """A 1x1 stem, three stages of shuffling units, a 1x1 convolution, global average pooling, one linear head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(in_chans, _SHUFFLENET_V2_STEM))
        inputs = (_SHUFFLENET_V2_STEM, *SHUFFLENET_V2_CHANNELS)
        stages = [_shufflenet_v2_stage(inputs[i], SHUFFLENET_V2_CHANNELS[i], SHUFFLENET_V2_BLOCKS[i]) for i in range(3)]
        self.stage1, self.stage2, self.stage3 = stages
        self.last = nn.Sequential(*_pointwise(SHUFFLENET_V2_CHANNELS[-1], _SHUFFLENET_V2_LAST))
        self.head = nn.Linear(_SHUFFLENET_V2_LAST, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        features = self.last(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _ShuffleV2Unit(nn.Module):
    """Half of the channels pass by, the others are convolved; then both are shuffled (figure 3c of the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(*_pointwise(half, half), *_depthwise(half, stride=1), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        passing, convolved = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([passing, self.branch(convolved)], dim=1), 2)


class _ShuffleV2DownsamplingUnit(nn.Module):
    """Both branches read all channels and halve the resolution (figure 3d)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.short = nn.Sequential(*_depthwise(inputs, stride=2), *_pointwise(inputs, half))
        self.branch = nn.Sequential(*_pointwise(inputs, half), *_depthwise(half, stride=2), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.short(x), self.branch(x)], dim=1), 2)


def _shufflenet_v2_stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _ShuffleV2DownsamplingUnit(inputs, outputs), *(_ShuffleV2Unit(outputs) for _ in range(blocks - 1))
    )


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


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
