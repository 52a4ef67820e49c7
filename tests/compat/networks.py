"""The networks of the compatibility table: how to build each with few classes, and an input for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        build: makes it, with random weights.
        shape: shape of one input, without the batch.
        slow: whether continuous integration leaves it to the full run.
        less: why less than six times less is kept than by plain training.
        tokens: the input holds integers below this, not images.
        cosine: of all gradients to those of plain training, at least.
        computes_weights: some of its weights are computed from parameters.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    slow: bool = False
    less: str = ""
    tokens: int = 0
    cosine: float = 0.99
    computes_weights: bool = False

    def input(self, batch: int) -> Tensor:
        if self.tokens:
            return torch.randint(0, self.tokens, (batch, *self.shape))
        if len(self.shape) == 3 and self.shape[0] == 3:
            from examples.data.photographs import photograph_batch

            seed = int(torch.randint(2**31, ()))
            return photograph_batch(batch, self.shape[1], seed)[0]
        return torch.randn(batch, *self.shape)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return build


def _video() -> nn.Module:
    from torchvision.models.video import r3d_18

    return r3d_18(weights=None, num_classes=CLASSES)


class _Segmentation(nn.Module):
    """Class scores per image out of a segmentation network, so that one loss serves all cases."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.segmentation import deeplabv3_resnet50

        self.net = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"].mean((2, 3))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return build


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 32, 9, stride=4), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4),
        nn.Conv1d(32, 64, 3, padding=1), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(4),
        nn.Conv1d(64, 64, 3, padding="same", dilation=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())
        self.out = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        merged = self.merge(torch.cat([self.up(self.down2(first)), first], 1))
        return self.out(merged).mean((2, 3))


class Encoder(nn.Module):
    """Text classifier with stock transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Decoder(nn.Module):
    """Language model in the manner of today's: separate projections that read one input, gated feed-forward."""

    class Block(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
            self.down = nn.Linear(2 * width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm1(x)
            q, k, v = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 32, batch_first=True)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(tokens))
        return self.head(F.relu(self.hidden(states)).mean(1))


class Tied(nn.Module):
    """The output layer shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.hidden = nn.Linear(32, 32)
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(self.embed(tokens)))).mean(1)[:, :CLASSES]


class SharedModule(nn.Module):
    """One module under two names, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.alias = self.block[0]
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.block(self.block(self.stem(x))))
        return self.head(x.mean((2, 3)))


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(
            norm(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
        )  # fmt: skip

    return build


class Functional(nn.Module):
    """Some layers are calls with a weight of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.relu(self.stem(x)), self.kernel, padding=1))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


def conv_same() -> nn.Module:
    from timm.layers import Conv2dSame

    return nn.Sequential(
        Conv2dSame(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding="same"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def _mcunet() -> nn.Module:
    from examples.models.mcunet import mcunet_in1

    return mcunet_in1(CLASSES)


NETWORKS: dict[str, Case] = {
    # torchvision
    "resnet18": Case(_torchvision("resnet18")),
    "resnet34": Case(_torchvision("resnet34"), slow=True),
    "resnet50": Case(_torchvision("resnet50"), slow=True),
    "mobilenet_v2": Case(_torchvision("mobilenet_v2")),
    "mobilenet_v3_small": Case(_torchvision("mobilenet_v3_small")),
    "efficientnet_b0": Case(_torchvision("efficientnet_b0"), slow=True),
    "convnext_tiny": Case(_torchvision("convnext_tiny"), slow=True),
    "shufflenet_v2_x1_0": Case(_torchvision("shufflenet_v2_x1_0"), slow=True),
    "densenet121": Case(_torchvision("densenet121"), slow=True),
    "vgg11_bn": Case(_torchvision("vgg11_bn"), slow=True),
    "alexnet": Case(_torchvision("alexnet"), slow=True),
    "vit_b_16": Case(_torchvision("vit_b_16", image_size=64), slow=True),
    "swin_t": Case(_torchvision("swin_t"), slow=True),
    "r3d_18": Case(_video, (3, 4, 32, 32), slow=True),
    "deeplabv3_resnet50": Case(_Segmentation, (3, 32, 32), slow=True),
    # timm
    "tf_efficientnet_lite0": Case(_timm("tf_efficientnet_lite0")),
    "deit_tiny_patch16_224": Case(_timm("deit_tiny_patch16_224", img_size=64)),
    "mobilenetv4_conv_small": Case(_timm("mobilenetv4_conv_small")),
    "resnetv2_50": Case(_timm("resnetv2_50"), slow=True),
    "nf_resnet26 (ScaledStd)": Case(_timm("nf_resnet26"), slow=True, computes_weights=True),
    "tiny_vit_5m_224": Case(_timm("tiny_vit_5m_224"), slow=True),
    "vit_tiny_patch16_224": Case(_timm("vit_tiny_patch16_224", img_size=64), slow=True),
    "regnety_002": Case(_timm("regnety_002"), slow=True),
    "ghostnet_100": Case(_timm("ghostnet_100"), slow=True),
    "mobilevit_xxs": Case(_timm("mobilevit_xxs"), slow=True),
    "poolformer_s12": Case(_timm("poolformer_s12"), slow=True),
    "mixer_s32_224": Case(_timm("mixer_s32_224", img_size=64), slow=True),
    "MCUNet-in1": Case(_mcunet, (3, 96, 96)),
    # plain
    "MLP": Case(mlp, (3, 16, 16), less="so little that it is left as it is after the first step"),
    "Conv1d audio": Case(audio, (1, 1024)),
    "U-Net": Case(UNet, (3, 32, 32)),
    "nn.TransformerEncoder": Case(Encoder, (24,), tokens=50),
    "decoder, separate q k v": Case(Decoder, (24,), tokens=50),
    "LSTM": Case(Recurrent, (24,), tokens=50),
    "weight tying": Case(Tied, (24,), tokens=50, less="so little that it is left as it is after the first step"),
    "shared modules": Case(SharedModule, (3, 16, 16)),
    "spectral_norm": Case(normed(nn.utils.parametrizations.spectral_norm), (3, 16, 16), computes_weights=True),
    "weight_norm": Case(normed(nn.utils.parametrizations.weight_norm), (3, 16, 16), computes_weights=True),
    "weight_norm (hook)": Case(normed(nn.utils.weight_norm), (3, 16, 16), computes_weights=True),
    "F.conv2d calls": Case(Functional, (3, 16, 16)),
    "Conv2dSame": Case(conv_same, (3, 32, 32)),
}
