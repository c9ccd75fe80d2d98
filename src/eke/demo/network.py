"""The demo's network: a residual net of three blocks with widths 32, 64 and 128.

About 0.31 M parameters and 74 MFLOP per 28x28 image. Blocks after He et al., "Deep Residual Learning for Image
Recognition", 2016 (projection shortcut where the shape changes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels_out, h/stride, w/stride) for x (batch, channels_in, h, w)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """Stem, three residual blocks, global average pooling and a linear classifier.

    Args:
        widths: Channels of the three stages.
        classes: Number of classes.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.blocks = nn.Sequential(Block(first, first, 1), Block(first, second, 2), Block(second, third, 2))
        self.classifier = nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) for normalised images (batch, 1, 28, 28)."""
        features = self.blocks(self.stem(images))
        pooled: Tensor = torch.flatten(F.adaptive_avg_pool2d(features, 1), 1)
        logits: Tensor = self.classifier(pooled)
        return logits
