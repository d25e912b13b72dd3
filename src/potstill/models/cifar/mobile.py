"""Networks for mobile devices, for 32 px images: MobileNetV2, ShuffleNet (version 1) and ShuffleNet V2.

Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
https://arxiv.org/abs/1801.04381
In the form of the distillation literature: half the paper's width, of five strides the second is left out (so the
last maps are 2x2), ReLU stands for ReLU6, and the first block has a 1x1 expansion although it does not widen.

Zhang, Zhou, Lin and Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, table 1 with three groups.  https://arxiv.org/abs/1707.01083

Ma, Zhang, Zheng and Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
table 5 at 1x.  https://arxiv.org/abs/1807.11164

Both ShuffleNets in the form of the distillation literature: the stem is a 1x1 convolution without stride or pooling,
so that the three stages see 16, 8 and 4 pixels.  Weights start as torch draws them, as in the released networks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """A 3x3 stem of stride 2, inverted residuals in four stages, a 1x1 convolution, global average pooling, a head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
        width: share of the paper's channels.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, width: float = 0.5) -> None:
        super().__init__()
        channels = int(_MOBILENET_STEM * width)
        self.stem = _mobilenet_convolution(in_chans, channels, 3, stride=2)
        stages = []
        for rows in MOBILENET_STAGES:
            blocks: list[nn.Module] = []
            for expansion, full, count, stride in (MOBILENET_ROWS[row] for row in rows):
                for position in range(count):
                    outputs = int(full * width)
                    blocks.append(_InvertedResidual(channels, outputs, stride if position == 0 else 1, expansion))
                    channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.last = _mobilenet_convolution(channels, max(_MOBILENET_LAST, int(_MOBILENET_LAST * width)), 1)
        self.head = nn.Linear(max(_MOBILENET_LAST, int(_MOBILENET_LAST * width)), num_classes)
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
    """A 1x1 stem, three stages of shuffling units, global average pooling, one linear head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
    """

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
    """Grouped 1x1, shuffle, 3x3 on each channel, grouped 1x1.

    With stride 2 the averaged input joins as further channels (figure 2c of the paper), else it is added.
    """

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
    """A 1x1 stem, three stages of shuffling units, a 1x1 convolution, global average pooling, one linear head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
    """

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
