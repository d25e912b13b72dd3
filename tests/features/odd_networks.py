"""Networks by hand, each with one habit that anatomy must cope with."""

import torch.nn.functional as F
from torch import nn


class Plain(nn.Module):
    """The first network of every course: layers as attributes, activations and pooling as functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 1, 1)
        self.fc1, self.fc2 = nn.Linear(12 * 4 * 4, 20), nn.Linear(20, 5)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Shared(nn.Module):
    """One activation and one pooling module for all layers, in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        x = self.pool(self.relu(self.bn1(self.conv1(images))))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


class Block(nn.Module):
    """Residual; writes into its own sum, so that the map before activation is lost unless it is copied."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs, 1), nn.Sigmoid())
        self.detour = nn.ConvTranspose2d(outputs, outputs, 4, 4)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out * self.squeeze(out)
        out = out + F.avg_pool2d(self.detour(out), 4)
        out += self.shortcut(x)
        return F.relu_(out)


class First(Block):
    """The only one of its class, so that nothing but its place tells that it is no stem."""


class Residual(nn.Module):
    """Blocks in one row, each a stage, with a smaller and a larger map inside; within a part without a class."""

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body.blocks = nn.Sequential(First(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.body.forward = lambda images: self.body.blocks(self.body.stem(images))
        self.head = nn.Linear(32, 5)

    def forward(self, images):
        return self.head(self.body(images).mean(dim=(2, 3)))


class Pooled(nn.Module):
    """Stages that end with their pooling, as some write VGG."""

    def __init__(self):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(12 * 4 * 4, 5)

    def forward(self, images):
        return self.head(self.block2(self.block1(images)).flatten(1))
