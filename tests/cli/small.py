"""A small LightningModule and its data, as a user of the command line has them in a file."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH = 32


class SmallModule(pl.LightningModule):
    """Two convolutions and a classifier of 8 x 8 images.

    Args:
        width: channels.
        learning_rate: of SGD.
    """

    def __init__(self, width: int = 8, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * width, 4),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])


class SmallData(pl.LightningDataModule):
    """Images whose class is the quadrant that is bright.

    Args:
        count: number of images.
    """

    def __init__(self, count: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count) % 4
        images = torch.randn(count, 3, 8, 8, generator=generator) * 0.3
        for index, label in enumerate(labels.tolist()):
            row, column = divmod(label, 2)
            images[index, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        self.data = TensorDataset(images, labels)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=BATCH)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=BATCH, shuffle=True)

    val_dataloader = test_dataloader = predict_dataloader = loader


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "accelerator": "cpu",
}
"""Trainer arguments of a run that writes nothing."""
