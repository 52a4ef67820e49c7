"""Whole networks to train, every parameter of them, and their batches, for the comparisons of ways to save memory.

Dropout and stochastic depth are off, so that the gradients of two ways can be compared.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data.photographs import photograph_batch

SEED = 0
VOCABULARY = 128

Batch = tuple[Tensor, Tensor]


class UNet(nn.Module):
    """U-Net of three levels with batch norm (Ronneberger et al., MICCAI 2015): `(B, 3, H, W)` to `(B, 2, H, W)`.

    Args:
        width: channels of the first level.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_double(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.bottom = _double(widths[-1], 8 * width)
        self.lift = nn.ModuleList(nn.ConvTranspose2d(2 * after, after, 2, stride=2) for after in reversed(widths))
        self.up = nn.ModuleList(_double(2 * after, after) for after in reversed(widths))
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for block in self.down:
            x = block(x)
            skipped.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for lift, block, skip in zip(self.lift, self.up, reversed(skipped), strict=True):
            x = block(torch.cat([lift(x), skip], 1))
        return self.out(x)


def _double(before: int, after: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in (before, after):
        parts += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class Decoder(nn.Module):
    """Language model in the shape of GPT-2 (Radford et al., 2019): tokens `(B, T)` to logits `(B, T, vocabulary)`.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream.
        depth: number of blocks.
        heads: of attention.
        length: longest sequence.
    """

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(self.norm1(x)).chunk(3, -1)
            query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(self.Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _torchvision(name: str, **options: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(**options)

    return build


def vit_tiny(size: int) -> nn.Module:
    from timm import create_model

    return create_model("vit_tiny_patch16_224", pretrained=False, img_size=size)


def vit_b_16(size: int) -> nn.Module:
    from torchvision.models import vit_b_16

    model = vit_b_16(image_size=size)
    head = model.heads.head
    nn.init.trunc_normal_(head.weight, std=head.in_features**-0.5)  # zero at first: nothing before it has a gradient
    return model


def swin_t() -> nn.Module:
    from torchvision.models import swin_t
    from torchvision.ops import StochasticDepth

    model = swin_t()
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return model


def photographs(batch: int, size: int, index: int) -> Batch:
    images, labels = photograph_batch(batch, size, index)
    return images.contiguous(), labels


def masks(batch: int, size: int, index: int) -> Batch:
    """Photographs, and for each pixel whether it is brighter than the mean of its image."""
    images, _ = photographs(batch, size, index)
    grey = images.mean(1)
    return images, (grey > grey.mean((1, 2), keepdim=True)).long()


def characters(batch: int, size: int, index: int) -> Batch:
    """Characters of two modules of the standard library, and the ones that follow."""
    text = (inspect.getsource(argparse) + inspect.getsource(textwrap)).encode("ascii", "ignore")
    codes = torch.tensor(list(text)).clamp_(max=VOCABULARY - 1)
    starts = torch.randint(len(codes) - size - 1, (batch,), generator=torch.Generator().manual_seed(index))
    rows = torch.stack([codes[start : start + size + 1] for start in starts.tolist()])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _children(*paths: str) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [block for path in paths for block in model.get_submodule(path).children()]


@dataclass(frozen=True)
class Workload:
    """A network and its batches.

    Attributes:
        title: for people.
        make: builds the network for inputs of a size, with weights drawn from the global generator.
        blocks: its blocks, in forward order, which checkpointing runs again one by one.
        data: `data(batch, size, index)` makes a batch.
        batch: samples of a batch.
        size: side of the images in pixels, or tokens.
        transformer: whether most of what it keeps are tokens.
    """

    title: str
    make: Callable[[int], nn.Module]
    blocks: Callable[[nn.Module], list[nn.Module]]
    batch: int
    size: int
    data: Callable[[int, int, int], Batch] = photographs
    transformer: bool = False

    def build(self) -> nn.Module:
        """The network in training mode; equal weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.make(self.size).train()

    def batches(self, count: int) -> list[Batch]:
        """The first batches, equal at every call."""
        return [self.data(self.batch, self.size, index) for index in range(count)]

    def scaled(self, batch: int, size: int) -> Workload:
        """The same with other batches."""
        return replace(self, batch=batch, size=size)

    @property
    def label(self) -> str:
        """Title, batch and size."""
        return f"{self.title}, batch {self.batch}, {self.size} {'tokens' if self.data is characters else 'px'}"


def loss(model: Callable[[Tensor], Tensor], batch: Sequence[Tensor]) -> Tensor:
    """Mean cross entropy over samples, pixels or tokens."""
    outputs, labels = model(batch[0]), batch[1]
    return (
        F.cross_entropy(outputs.flatten(0, 1), labels.flatten())
        if outputs.dim() == 3
        else F.cross_entropy(outputs, labels)
    )


def _of_any_size(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda _: build()


_RESNET = _children("layer1", "layer2", "layer3", "layer4")
_FEATURES = _children("features")

WORKLOADS = {
    "resnet18": Workload("ResNet-18", _of_any_size(_torchvision("resnet18")), _RESNET, 32, 224),
    "mobilenet_v2": Workload(
        "MobileNetV2", _of_any_size(_torchvision("mobilenet_v2", dropout=0.0)), _FEATURES, 32, 112
    ),
    "efficientnet_b0": Workload(
        "EfficientNet-B0",
        _of_any_size(_torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0)),
        _FEATURES,
        32,
        112,
    ),
    "unet": Workload("U-Net", _of_any_size(UNet), lambda model: [*model.down, model.bottom, *model.up], 8, 128, masks),
    "vit_tiny": Workload("ViT-Tiny", vit_tiny, _children("blocks"), 32, 224, transformer=True),
    "swin_t": Workload(
        "Swin-T",
        _of_any_size(swin_t),
        lambda model: [block for stage in model.features[1::2] for block in stage],
        16,
        112,
        transformer=True,
    ),
    "text": Workload(
        "text transformer",
        lambda size: Decoder(VOCABULARY, 256, 6, 8, size),
        lambda model: list(model.blocks),
        16,
        256,
        characters,
        transformer=True,
    ),
}

LARGE = {
    "resnet50": Workload("ResNet-50", _of_any_size(_torchvision("resnet50")), _RESNET, 128, 224),
    "vit_b_16": Workload("ViT-B/16", vit_b_16, _children("encoder.layers"), 64, 224, transformer=True),
    "swin_t": WORKLOADS["swin_t"].scaled(64, 224),
    "gpt2": Workload(
        "decoder in the shape of GPT-2 small",
        lambda size: Decoder(50257, 768, 12, 12, size),
        lambda model: list(model.blocks),
        8,
        1024,
        characters,
        transformer=True,
    ),
}
"""For accelerators."""
