"""Segmentation: a U-Net finds discs in noise.

Run it with `python -m examples.segmentation`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lance import LanceCallback


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
    )


class UNet(L.LightningModule):
    """Two levels; the maps on the way down are joined to those on the way up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down, self.bottom = block(1, width), block(width, 2 * width)
        self.widen = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up, self.head = block(2 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down(images)
        coarse = self.bottom(F.max_pool2d(fine, 2))
        return self.head(self.up(torch.cat([fine, self.widen(coarse)], dim=1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        return F.binary_cross_entropy_with_logits(self(images), masks)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, masks = batch
        found = self(images) > 0
        self.log("iou", (found & (masks > 0)).sum() / (found | (masks > 0)).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def discs(count: int, size: int = 48, seed: int = 0) -> TensorDataset:
    """Images `(1, size, size)` with a disc each, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * size
    radius = 5 + 8 * torch.rand(count, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = ((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2 < radius**2)[:, None].float()
    return TensorDataset(masks + 0.7 * torch.randn(masks.shape, generator=generator), masks)


def main(arguments: Sequence[str] | None = None) -> float:
    """Returns the intersection over union of the validation images."""
    options = parser().parse_args(arguments)
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[LanceCallback()],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(
        UNet(), DataLoader(discs(options.images), batch_size=16, shuffle=True), DataLoader(discs(64, seed=1), 64)
    )
    iou = float(trainer.callback_metrics["iou"])
    print(f"intersection over union {iou:.3f}")
    return iou


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train a U-Net with LANCE.")
    result.add_argument("--epochs", type=int, default=4)
    result.add_argument("--images", type=int, default=512)
    return result


if __name__ == "__main__":
    main()
