"""Residual networks for 32 px images: ResNet, ResNet with bottlenecks, Wide ResNet.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (``ResNet``) and table 1
(``FourStageResNet``).  https://arxiv.org/abs/1512.03385

Four stages in the form of the distillation literature and of CIFAR repositories: the stem is one 3x3 convolution
without pooling, so that the stages see 32, 16, 8 and 4 pixels.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.  https://arxiv.org/abs/1605.07146
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

RESNET_WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
RESNET_WIDTHS_X4 = (32, 64, 128, 256)  # the x4 networks of the distillation literature (resnet8x4, resnet32x4)


class ResNet(nn.Module):
    """``6n + 2`` layers: a 3x3 stem, three stages of n blocks, global average pooling, one linear head.

    Where a block changes shape, its shortcut is a 1x1 convolution with BatchNorm (option B of the paper), as in all
    published tables of distillation.  The paper's own CIFAR networks have no weights there (option A): every second
    pixel of the input, with channels of zeros added, half of them before and half behind its own.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110 or any ``6n + 2``.
        num_classes: K.
        in_chans: channels of the images.
        widths: channels of the stem and of the three stages.
        shortcut: "A" or "B", of the blocks that change shape.
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

    Args:
        depth: 18 or 34 with blocks of two 3x3 convolutions; 50, 101 or 152 with bottlenecks.
        num_classes: K.
        in_chans: channels of the images.
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

    Args:
        depth: d, any ``6n + 4``.
        width: k; the stages have 16k, 32k and 64k channels.
        num_classes: K.
        in_chans: channels of the images.
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
