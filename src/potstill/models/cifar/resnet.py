"""Residual networks for 32 px images.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
https://arxiv.org/abs/1512.03385
"""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
WIDTHS_X4 = (32, 64, 128, 256)  # the x4 networks of the distillation literature (resnet8x4, resnet32x4)


class ResNet(nn.Module):
    """``6n + 2`` layers: a 3x3 stem, three stages of n blocks, global average pooling, one linear head.

    Where a block changes shape, its shortcut is a 1x1 convolution with BatchNorm (option B of the paper), as in all
    published tables of distillation; the paper's own CIFAR networks pad with zeros there and have 2,752 weights less.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110 or any ``6n + 2``.
        num_classes: K.
        in_chans: channels of the images.
        widths: channels of the stem and of the three stages.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.stage1 = _stage(stem, stages[0], blocks, stride=1)
        self.stage2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.stage3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.head = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))
