"""MCUNet-in1, a network for microcontrollers, from its published block table.

Lin et al., *MCUNet: Tiny Deep Learning on IoT Devices*, NeurIPS 2020: 12.8 million multiply-accumulates on an image of
96 x 96, 0.64 million parameters with 1,000 classes.
"""

from __future__ import annotations

from torch import Tensor, nn

# Kernel size, expansion, output channels, stride of the inverted residual blocks.
BLOCKS = [
    (3, 1, 8, 1),
    (3, 4, 16, 2),
    (3, 3, 16, 1),
    (7, 3, 24, 2),
    (3, 5, 24, 1),
    (3, 5, 40, 2),
    (7, 4, 40, 1),
    (5, 4, 48, 1),
    (3, 3, 48, 1),
    (3, 4, 48, 1),
    (7, 5, 96, 2),
    (5, 4, 96, 1),
    (5, 4, 96, 1),
    (3, 6, 160, 1),
]
STEM = 16
IMAGE_SIZE = 96


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.ReLU6(inplace=True)) if active else nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv(inputs, hidden, 1)] if expansion > 1 else []
        filters = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.body = nn.Sequential(*expand, filters, _conv(hidden, outputs, 1, active=False))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mcunet_in1(num_classes: int = 1000) -> nn.Sequential:
    """`(B, 3, 96, 96)` to `(B, num_classes)`, with random weights."""
    blocks: list[nn.Module] = [_conv(3, STEM, 3, 2)]
    channels = STEM
    for kernel, expansion, outputs, stride in BLOCKS:
        blocks.append(InvertedResidual(channels, outputs, kernel, stride, expansion))
        channels = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
