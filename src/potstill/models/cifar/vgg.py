"""VGG for 32 px images: BatchNorm after each convolution, and one linear head in place of three.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1.
https://arxiv.org/abs/1409.1556  (VGG8, one convolution a stage, comes from the distillation literature.)
"""

from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {  # in each of the five stages
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with 2x2 max pooling between them, global average pooling, a linear head.

    The last stage sees 4x4 maps at 32 px as in the distillation literature: the fourth pooling is left out below
    64 px.  Needs at least 8 px.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: K.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        inputs = (in_chans, *CHANNELS)
        stages = [_stage(inputs[i], CHANNELS[i], CONVOLUTIONS[depth][i]) for i in range(5)]
        self.stage1, self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(CHANNELS[-1], num_classes)
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
