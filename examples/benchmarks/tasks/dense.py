"""Images to images, from scratch: segmentation and reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.benchmarks.tasks.images import mnist
from examples.benchmarks.tasks.task import EXPLAINED, OVERLAP, Data, Pairs, Task, adamw

SIDE = 48
KINDS = 4
"""Background, discs, squares and triangles."""


def _shapes(count: int, generator: torch.Generator) -> Pairs:
    """Three shapes of random kind, place, size and brightness, in noise: images and the kinds of their pixels."""
    across = torch.arange(SIDE).float()
    kinds = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    images = torch.zeros(count, SIDE, SIDE)
    for _ in range(3):
        middle = SIDE * (0.2 + 0.6 * torch.rand(count, 2, 1, generator=generator))
        size = (5 + 5 * torch.rand(count, generator=generator))[:, None, None]
        down, right = (across - middle[:, 0])[:, :, None], (across - middle[:, 1])[:, None, :]
        inside = torch.stack(
            [
                down.square() + right.square() < size.square(),
                (down.abs() < 0.85 * size) & (right.abs() < 0.85 * size),
                (down < 0.8 * size) & (down > 2 * right.abs() - size),
            ]
        )
        which = torch.randint(3, (count,), generator=generator)
        mask = inside[which, torch.arange(count)]
        bright = 0.5 + torch.rand(count, generator=generator)[:, None, None]
        kinds = torch.where(mask, which[:, None, None] + 1, kinds)
        images = torch.where(mask, bright, images)
    images += 0.3 * torch.randn(images.shape, generator=generator)
    return images[:, None], kinds


def _shape_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data(_shapes(800, generator), _shapes(400, generator))


class UNet(nn.Module):
    """`(B, 1, S, S)` to `(B, kinds, S, S)`."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2 = _twice(1, width), _twice(width, 2 * width)
        self.bottom = _twice(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = _twice(4 * width, 2 * width), _twice(2 * width, width)
        self.out = nn.Conv2d(width, KINDS, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        merged = self.merge2(torch.cat([self.up2(self.bottom(self.pool(second))), second], 1))
        return self.out(self.merge1(torch.cat([self.up1(merged), first], 1)))  # type: ignore[no-any-return]


def _twice(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU()),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 24),
        nn.Linear(24, 32 * 7 * 7),
        nn.Unflatten(1, (32, 7, 7)),
        nn.Sequential(nn.SiLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)),
    )


def _reconstructions() -> Data:
    train, test = mnist()
    return Data((train[0], train[0]), (test[0], test[0]))


unet = Task(
    "U-Net, made shapes, AdamW",
    UNet,
    _shape_data,
    OVERLAP,
    adamw(4e-3),
    epochs=4,
    batch=16,
    seeds=4,
    segments=["down1", "down2", "bottom", "merge2", "merge1"],
)

autoencoder = Task(
    "convolutional autoencoder, SiLU, AdamW",
    _autoencoder,
    _reconstructions,
    EXPLAINED,
    adamw(4e-3),
    epochs=6,
    batch=64,
    seeds=6,
    segments=["0", "5"],
)
