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
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.input_spec import InputSpec, Triple


class _Network(nn.Module):
    """All layers one after the other, global average pooling, and the last layer, a linear head."""

    def _draw_weights(self) -> None:
        """Draw the weights of all convolutions, as most papers do."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        *layers, head = self.children()
        for layer in layers:
            images = layer(images)
        logits: Tensor = head(images.mean(dim=(2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


_Block = Callable[[int, int, int], nn.Module]  # of inputs, width and stride


def _stage(block: _Block, inputs: int, width: int, blocks: int, stride: int, expansion: int = 1) -> nn.Sequential:
    return nn.Sequential(block(inputs, width, stride), *(block(expansion * width, width, 1) for _ in range(blocks - 1)))


RESNET_WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
RESNET_WIDTHS_X4 = (32, 64, 128, 256)  # the x4 networks of the distillation literature (resnet8x4, resnet32x4)


class ResNet(_Network):
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
        block = partial(_BasicBlock, option=shortcut)
        self.stem = _convolution(in_chans, stem, 3)
        self.stage1 = _stage(block, stem, stages[0], blocks, stride=1)
        self.stage2 = _stage(block, stages[0], stages[1], blocks, stride=2)
        self.stage3 = _stage(block, stages[1], stages[2], blocks, stride=2)
        self.head = nn.Linear(stages[2], num_classes)
        self._draw_weights()


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, option: str = "B") -> None:
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


class FourStageResNet(_Network):
    """A 3x3 stem, four stages of residual blocks, global average pooling, one linear head.

    Blocks of two 3x3 convolutions up to ``depth`` 34; bottlenecks in 50, 101 and 152.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = _convolution(in_chans, 64, 3)
        block: _Block
        block, expansion = (_Bottleneck, _EXPANSION) if depth >= _FIRST_WITH_BOTTLENECKS else (_BasicBlock, 1)
        inputs = (64, *(expansion * width for width in FOUR_STAGE_WIDTHS))
        rows = zip(inputs, FOUR_STAGE_WIDTHS, FOUR_STAGE_BLOCKS[depth], (1, 2, 2, 2), strict=False)
        self.stage1, self.stage2, self.stage3, self.stage4 = (_stage(block, *row, expansion) for row in rows)
        self.head = nn.Linear(inputs[-1], num_classes)
        self._draw_weights()


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


WIDE_RESNETS = ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))  # depth and width of those that lists name


class WideResNet(_Network):
    """WRN-d-k: a 3x3 stem of 16 channels, three stages of ``(d - 4) / 6`` blocks, global average pooling, a head.

    BatchNorm and ReLU come before each convolution (table 1 of the paper); the shortcut of a block that changes shape
    is a 1x1 convolution of the activated input.  No dropout.

    ``depth`` is any ``6n + 4``, the stages have 16, 32 and 64 times ``width`` channels.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(_PreActivationBlock, 16, 16 * width, blocks, stride=1)
        self.stage2 = _stage(_PreActivationBlock, 16 * width, 32 * width, blocks, stride=2)
        self.stage3 = _stage(_PreActivationBlock, 32 * width, 64 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()  # a layer, so that methods can put others behind the last map
        self.head = nn.Linear(64 * width, num_classes)
        self._draw_weights()


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


VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {  # in each of the five stages
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(_Network):
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
        self._draw_weights()

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


class MobileNetV2(_Network):
    """A 3x3 stem of stride 2, inverted residuals in four stages, a 1x1 convolution, global average pooling, a head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = _MOBILENET_STEM // 2  # half the paper's width
        self.stem = _convolution(in_chans, channels, 3, stride=2)
        stages = []
        for rows in MOBILENET_STAGES:
            blocks: list[nn.Module] = []
            for expansion, full, count, stride in (MOBILENET_ROWS[row] for row in rows):
                blocks += _stage(partial(_InvertedResidual, expansion=expansion), channels, full // 2, count, stride)
                channels = full // 2
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.last = _convolution(channels, _MOBILENET_LAST, 1)
        self.head = nn.Linear(_MOBILENET_LAST, num_classes)
        self._draw_weights()
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)


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


SHUFFLENET_V1_CHANNELS = (240, 480, 960)  # for three groups
SHUFFLENET_V1_BLOCKS = (4, 8, 4)
SHUFFLENET_V1_GROUPS = 3
_SHUFFLENET_V1_STEM = 24


class ShuffleNetV1(_Network):
    """A 1x1 stem, three stages of shuffling units, global average pooling, one linear head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = _convolution(in_chans, _SHUFFLENET_V1_STEM, 1)
        inputs = (_SHUFFLENET_V1_STEM, *SHUFFLENET_V1_CHANNELS)
        rows = zip(inputs, SHUFFLENET_V1_CHANNELS, SHUFFLENET_V1_BLOCKS, strict=False)
        self.stage1, self.stage2, self.stage3 = (_stage(_ShuffleV1Unit, *row, stride=2) for row in rows)
        self.head = nn.Linear(SHUFFLENET_V1_CHANNELS[-1], num_classes)


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


SHUFFLENET_V2_CHANNELS = (116, 232, 464)
SHUFFLENET_V2_BLOCKS = (4, 8, 4)
_SHUFFLENET_V2_STEM, _SHUFFLENET_V2_LAST = 24, 1024


class ShuffleNetV2(_Network):
    """A 1x1 stem, three stages of shuffling units, a 1x1 convolution, global average pooling, one linear head."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = _convolution(in_chans, _SHUFFLENET_V2_STEM, 1)
        inputs = (_SHUFFLENET_V2_STEM, *SHUFFLENET_V2_CHANNELS)
        rows = zip(inputs, SHUFFLENET_V2_CHANNELS, SHUFFLENET_V2_BLOCKS, strict=False)
        self.stage1, self.stage2, self.stage3 = (_stage(_ShuffleV2Unit, *row, stride=2) for row in rows)
        self.last = _convolution(SHUFFLENET_V2_CHANNELS[-1], _SHUFFLENET_V2_LAST, 1)
        self.head = nn.Linear(_SHUFFLENET_V2_LAST, num_classes)


class _ShuffleV2Unit(nn.Module):
    """Half of the channels pass by, the others are convolved; then both are shuffled (figure 3c of the paper).

    With stride 2, both branches read all channels and halve the resolution (figure 3d).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.short = nn.Sequential(*_depthwise(inputs, 2), *_convolution(inputs, half, 1)) if stride == 2 else None
        first = _convolution(inputs if stride == 2 else half, half, 1)
        self.branch = nn.Sequential(*first, *_depthwise(half, stride), *_convolution(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        passing, convolved = x.chunk(2, dim=1) if self.short is None else (self.short(x), x)
        return F.channel_shuffle(torch.cat([passing, self.branch(convolved)], dim=1), 2)


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


# Name -> network for (num_classes, in_chans).
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}_a": partial(ResNet, depth, shortcut="A") for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, widths=RESNET_WIDTHS_X4) for depth in (8, 32)},
    **{f"resnet{depth}": partial(FourStageResNet, depth) for depth in (18, 34, 50)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth, width in WIDE_RESNETS},
    **{f"vgg{depth}": partial(VGG, depth) for depth in VGG_CONVOLUTIONS},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
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
