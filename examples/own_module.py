"""A LightningModule of your own, trained plainly and with LANCE.

Run it with `python -m examples.own_module`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lance import LanceCallback


class Digits(L.LightningModule):
    """A small convolutional network for the 8 x 8 digits of scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """1,500 images to train, 297 to validate."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(found.target))
    train, val = random_split(data, [1500, 297], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=297)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the accuracy of each of the two."""
    options = parser().parse_args(arguments)
    accuracies = {}
    for name in ("plain", "LANCE"):
        L.seed_everything(0, verbose=False)
        callbacks = [LanceCallback()] if name == "LANCE" else []
        trainer = L.Trainer(
            max_epochs=options.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu"
        )
        trainer.fit(Digits(), *loaders())
        accuracies[name] = float(trainer.callback_metrics["accuracy"])
    for name, accuracy in accuracies.items():
        print(f"{name}: accuracy {accuracy:.3f}")
    return accuracies


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train a LightningModule plainly and with LANCE.")
    result.add_argument("--epochs", type=int, default=5)
    return result


if __name__ == "__main__":
    main()
