"""The DataModule of the fine-tuning experiments: any of the image sets, for a network made for ImageNet."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from examples.data.mnist import stratified_split
from examples.data.photographs import MEAN, STD
from examples.data.sets import SETS, load_set, targets_of


class ImageDataModule(L.LightningDataModule):
    """Images as a network made for ImageNet wants them: RGB, square, normalised.

    The test images are what validation reads too, unless a part of the training images is held out for it: nothing is
    chosen by them, and the accuracy of the last epoch is the one that counts.

    Args:
        name: an image set, a key of `examples.data.sets.SETS`.
        root: folder that holds it.
        image_size: height and width in pixels.
        batch_size: samples of a training step.
        flip: turn half of the training images left to right.
        held_out: share of each class of the training images that validation reads instead of the test images.
        train_size: use only so many training images, as many of each class; all by default.
        test_size: likewise for the test images.
        num_workers: processes that draw batches; 0 draws them in the training process.
        download: fetch the set with torchvision where it is not there.
        mean: of each channel, for pixels in [0, 1]. By default what the module in training asks for, as its attribute
            `normalization`, else those of ImageNet.
        std: likewise.
        seed: of what is held out or left out.

    Attributes:
        classes: number of classes.

    Raises:
        ValueError: there is no set of that name, or a share or size is not allowed.
        FileNotFoundError: at setup, the set is not there, or not whole.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 128,
        flip: bool = True,
        held_out: float = 0.0,
        train_size: int | None = None,
        test_size: int | None = None,
        num_workers: int = 0,
        download: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if name not in SETS:
            raise ValueError(f"name={name!r} is not an image set. Allowed: {', '.join(SETS)}.")
        if not 0.0 <= held_out < 1.0:
            raise ValueError(f"held_out={held_out!r} is not allowed. Allowed: a share in [0, 1), such as 0.05.")
        for what, value in (("image_size", image_size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{what}={value!r} is not allowed. Allowed: an int of at least 1.")
        self.save_hyperparameters()
        self.classes = SETS[name].classes
        self.splits: dict[str, Any] = {}

    def prepare_data(self) -> None:
        if self.hparams["download"]:
            for train in (True, False):
                load_set(self.hparams["name"], self.hparams["root"], train, download=True)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        train, plain = (self._load(True, flip) for flip in (self.hparams["flip"], False))
        test = self._limited(self._load(False, False), self.hparams["test_size"])
        if self.hparams["held_out"]:
            labels = torch.tensor(targets_of(train))
            held, rest = stratified_split(labels, [self.hparams["held_out"]], self.hparams["seed"])
            val, train = Subset(plain, held.tolist()), Subset(train, rest.tolist())
        else:
            val = test
        self.splits = {"train": self._limited(train, self.hparams["train_size"]), "val": val, "test": test}

    def _load(self, train: bool, flip: bool) -> Dataset[Any]:
        return load_set(self.hparams["name"], self.hparams["root"], train, self.transform(flip))

    def _limited(self, dataset: Any, size: int | None) -> Any:
        if size is None or size >= len(dataset):
            return dataset
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        labels = torch.tensor(targets_of(whole))
        index = torch.tensor(dataset.indices) if isinstance(dataset, Subset) else torch.arange(len(labels))
        kept, _ = stratified_split(labels[index], [size / len(index)], self.hparams["seed"])
        return Subset(whole, index[kept].tolist())

    def transform(self, flip: bool) -> Any:
        """From a `PIL.Image` to a normalised tensor `(3, S, S)`."""
        from torchvision import transforms

        size = self.hparams["image_size"]
        steps: list[Any] = [transforms.Lambda(_rgb), transforms.Resize((size, size), antialias=True)]
        if flip:
            steps.append(transforms.RandomHorizontalFlip())
        module = None if self.trainer is None else self.trainer.lightning_module
        asked = getattr(module, "normalization", (MEAN, STD))
        given = (self.hparams["mean"] or asked[0], self.hparams["std"] or asked[1])
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*given)])

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        """A loader over `"train"`, `"val"` or `"test"`."""
        workers = self.hparams["num_workers"]
        return DataLoader(
            self.splits[split],
            batch_size=self.hparams["batch_size"],
            shuffle=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    predict_dataloader = test_dataloader


def _rgb(image: Any) -> Any:
    return image.convert("RGB")
