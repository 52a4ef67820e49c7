"""The reduced ResNet-18 of continual learning (Lopez-Paz & Ranzato, *Gradient Episodic Memory*, NeurIPS 2017)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = ((1, 1), (2, 2), (4, 2), (8, 2))
"""Width, in parts of the first, and stride of each pair of blocks."""


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def _norm(channels: int) -> nn.BatchNorm2d:
    """With the statistics of the batch in evaluation too: running ones would mix those of all experiences."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ReducedResNet18(nn.Sequential):
    """ResNet-18 with an eighth to a third of the channels: `(B, 3, S, S)` to `(B, features)`.

    Args:
        width: channels of the first blocks.
        stride: of the first convolution; 2 for images of 84 pixels.
        pool: height and width that the last map is averaged to.

    Attributes:
        features: width of the output.
    """

    def __init__(self, width: int = 20, stride: int = 1, pool: int = 1) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride, 1, bias=False), _norm(width), nn.ReLU()]
        inputs = width
        for part, first in BLOCKS:
            layers += [Block(inputs, part * width, first), Block(part * width, part * width, 1)]
            inputs = part * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten())
        self.features = inputs * pool * pool
