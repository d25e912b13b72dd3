"""MobileNetV2 for 32 px images.

Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
https://arxiv.org/abs/1801.04381
In the form of the distillation literature: half the paper's width, of five strides the second is left out (so the
last maps are 2x2), ReLU stands for ReLU6, and the first block has a 1x1 expansion although it does not widen.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# Of each row of table 2: expansion, channels at full width, blocks, stride of the first.
ROWS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGES = ((0, 1), (2,), (3, 4), (5, 6))  # rows of one resolution: 16, 8, 4 and 2 pixels
_STEM, _LAST = 32, 1280  # the last convolution keeps its width in narrow networks


class MobileNetV2(nn.Module):
    """A 3x3 stem of stride 2, inverted residuals in four stages, a 1x1 convolution, global average pooling, a head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
        width: share of the paper's channels.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, width: float = 0.5) -> None:
        super().__init__()
        channels = int(_STEM * width)
        self.stem = _convolution(in_chans, channels, 3, stride=2)
        stages = []
        for rows in STAGES:
            blocks: list[nn.Module] = []
            for expansion, full, count, stride in (ROWS[row] for row in rows):
                for position in range(count):
                    outputs = int(full * width)
                    blocks.append(_InvertedResidual(channels, outputs, stride if position == 0 else 1, expansion))
                    channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.last = _convolution(channels, max(_LAST, int(_LAST * width)), 1)
        self.head = nn.Linear(max(_LAST, int(_LAST * width)), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
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


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
