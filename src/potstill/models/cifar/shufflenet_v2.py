"""ShuffleNet V2 for 32 px images.

Ma, Zhang, Zheng and Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
table 5 at 1x.  https://arxiv.org/abs/1807.11164
In the form of the distillation literature: the stem is a 1x1 convolution without stride or pooling, so that the three
stages see 16, 8 and 4 pixels.  Weights start as torch draws them, as in the released networks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (116, 232, 464)
BLOCKS = (4, 8, 4)
_STEM, _LAST = 24, 1024


class ShuffleNetV2(nn.Module):
    """A 1x1 stem, three stages of shuffling units, a 1x1 convolution, global average pooling, one linear head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(in_chans, _STEM))
        inputs = (_STEM, *CHANNELS)
        stages = [_stage(inputs[i], CHANNELS[i], BLOCKS[i]) for i in range(3)]
        self.stage1, self.stage2, self.stage3 = stages
        self.last = nn.Sequential(*_pointwise(CHANNELS[-1], _LAST))
        self.head = nn.Linear(_LAST, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        features = self.last(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _Unit(nn.Module):
    """Half of the channels pass by, the others are convolved; then both are shuffled (figure 3c of the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(*_pointwise(half, half), *_depthwise(half, stride=1), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        passing, convolved = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([passing, self.branch(convolved)], dim=1), 2)


class _Halving(nn.Module):
    """Both branches read all channels and halve the resolution (figure 3d)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.short = nn.Sequential(*_depthwise(inputs, stride=2), *_pointwise(inputs, half))
        self.branch = nn.Sequential(*_pointwise(inputs, half), *_depthwise(half, stride=2), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.short(x), self.branch(x)], dim=1), 2)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Halving(inputs, outputs), *(_Unit(outputs) for _ in range(blocks - 1)))


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]
