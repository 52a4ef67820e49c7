"""MCUNet, networks for microcontrollers: in1 from its published block table, any of them from its published files.

Lin et al., *MCUNet: Tiny Deep Learning on IoT Devices*, NeurIPS 2020. MCUNet-in1 has 12.8 million multiply-accumulates
on an image of 96 x 96, 0.64 million parameters with 1,000 classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expansion: int,
        hidden: int | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden or inputs * expansion
        expand = [_conv(inputs, hidden, 1)] if expansion > 1 else []
        filters = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.body = nn.Sequential(*expand, filters, _conv(hidden, outputs, 1, active=False))
        self.residual = residual and stride == 1 and inputs == outputs

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


def mcunet_from(config: str | Path, num_classes: int = 1000) -> nn.Sequential:
    """A network of the family from its published description, with random weights.

    Args:
        config: the JSON file that is published beside the weights, such as that of MCUNet-in2: `first_conv`, `blocks`
            of a `mobile_inverted_conv` and a `shortcut`, perhaps a `feature_mix_layer`.
        num_classes: outputs of the classifier.

    Returns:
        The network. Its tensors are in the order of the published weights.

    Raises:
        ValueError: the file does not describe such a network; the message names what is missing.
    """
    described = json.loads(Path(config).read_text(encoding="utf-8"))
    try:
        stem = described["first_conv"]
        channels = int(stem["out_channels"])
        layers: list[nn.Module] = [_conv(3, channels, int(stem["kernel_size"]), int(stem["stride"]))]
        for block in described["blocks"]:
            inner: dict[str, Any] | None = block["mobile_inverted_conv"]
            if inner is None or inner.get("name") == "ZeroLayer":  # searched away: only the shortcut is left
                continue
            outputs, expansion = int(inner["out_channels"]), int(inner["expand_ratio"])
            sizes = (int(inner["kernel_size"]), int(inner["stride"]), expansion, inner.get("mid_channels"))
            layers.append(InvertedResidual(channels, outputs, *sizes, residual=block.get("shortcut") is not None))
            channels = outputs
        last = described.get("feature_mix_layer")
        if last is not None:
            layers.append(_conv(channels, int(last["out_channels"]), 1))
            channels = int(last["out_channels"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"config={str(config)!r} does not describe a MCUNet: {error} is missing or of another kind. Give the JSON "
            "file that is published with the weights."
        ) from error
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
