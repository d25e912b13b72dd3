"""ShuffleNet (version 1) for 32 px images.

Zhang, Zhou, Lin and Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, table 1 with three groups.  https://arxiv.org/abs/1707.01083
In the form of the distillation literature: the stem is a 1x1 convolution without stride or pooling, so that the three
stages see 16, 8 and 4 pixels.  Weights start as torch draws them, as in the released networks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (240, 480, 960)  # for three groups
BLOCKS = (4, 8, 4)
GROUPS = 3
_STEM = 24


class ShuffleNetV1(nn.Module):
    """A 1x1 stem, three stages of shuffling units, global average pooling, one linear head.

    Args:
        num_classes: K.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, _STEM, 1, bias=False), nn.BatchNorm2d(_STEM), nn.ReLU())
        inputs = (_STEM, *CHANNELS)
        stages = [_stage(inputs[i], CHANNELS[i], BLOCKS[i]) for i in range(3)]
        self.stage1, self.stage2, self.stage3 = stages
        self.head = nn.Linear(CHANNELS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _Unit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 on each channel, grouped 1x1.

    With stride 2 the averaged input joins as further channels (figure 2c of the paper), else it is added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = outputs - inputs if stride == 2 else outputs
        inner = branch // 4
        # The few channels of the stem are not divided into groups (section 3.3).
        self.groups = 1 if inputs == _STEM else GROUPS
        self.conv1 = nn.Conv2d(inputs, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        # The paper has no activation here; the released networks of the distillation literature have.
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(inner)))))
        if self.stride == 2:
            return F.relu(torch.cat([branch, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))
        return F.relu(branch + x)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Unit(inputs, outputs, 2), *(_Unit(outputs, outputs, 1) for _ in range(blocks - 1)))
