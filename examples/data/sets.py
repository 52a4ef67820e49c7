"""Image sets by name: those of the paper's experiments, and those that packages ship.

Each loader is `loader(root, train, transform, download)` and returns a map-style dataset of `(image, label)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from examples.data.cub import CUB200
from examples.data.folders import mini_imagenet, not_mnist
from examples.data.mnist import load_digits, stratified_split

Transform = Callable[[Any], Any]
Loader = Callable[[Path, bool, "Transform | None", bool], Any]


class ImageSet(NamedTuple):
    """How to load an image set.

    Attributes:
        load: its loader.
        classes: number of its classes.
    """

    load: Loader
    classes: int


class ArrayImages(Dataset[tuple[Any, int]]):
    """Images in memory.

    Args:
        images: `(n, H, W)` or `(n, H, W, 3)` bytes.
        targets: `n` labels.
        transform: applied to each `PIL.Image`.
    """

    def __init__(self, images: Any, targets: list[int], transform: Transform | None = None) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _torchvision(name: str, splits: tuple[Any, Any], argument: str = "split", parts: tuple[str, ...] = ()) -> Loader:
    """A set of torchvision.

    Args:
        name: of the class in `torchvision.datasets`.
        splits: values of its argument for training and for testing.
        argument: name of that argument.
        parts: further splits that are trained on too.
    """

    def load(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
        import torchvision.datasets

        make = getattr(torchvision.datasets, name)
        wanted = [splits[0], *parts] if train else [splits[1]]
        try:
            found = [make(str(root), **{argument: split}, transform=transform, download=download) for split in wanted]
        except RuntimeError as error:
            raise FileNotFoundError(
                f"root={str(root)!r}: {name} is not there, or not whole ({error}). Give the folder that holds it as "
                "torchvision lays it out, or download=True where there is a network."
            ) from error
        return found[0] if len(found) == 1 else torch.utils.data.ConcatDataset(found)

    return load


def _cub(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    return CUB200(root, train, transform)


def _mini(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    return mini_imagenet(root, train, transform)


def _letters(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    return not_mnist(root, train, transform)


def _halves(labels: torch.Tensor, train: bool) -> torch.Tensor:
    """Four fifths of each class to train on, or the other fifth."""
    test, rest = stratified_split(labels, [0.2], seed=0)
    return (rest if train else test).sort().values


def _packaged_mnist(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    images, labels = load_digits()
    index = _halves(labels, train)
    return ArrayImages(images[index].numpy(), labels[index].tolist(), transform)


def _packaged_digits(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    from sklearn.datasets import load_digits as load

    found = load()
    images = torch.from_numpy((found.images * 15.9375).astype(np.uint8))  # 0 to 16 becomes 0 to 255
    labels = torch.from_numpy(found.target.astype(np.int64))
    index = _halves(labels, train)
    return ArrayImages(images[index].numpy(), labels[index].tolist(), transform)


PHOTOGRAPH_CROPS = (1600, 400)
"""Training and test crops of the two photographs that scikit-learn ships."""


def _packaged_photographs(root: Path, train: bool, transform: Transform | None, download: bool) -> Any:
    """Crops of two photographs; the class is which one and in which quadrant of it the crop has its centre."""
    from examples.data.photographs import MEAN, STD, photograph_batch

    images, labels = photograph_batch(PHOTOGRAPH_CROPS[not train], 64, seed=0 if train else 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return ArrayImages(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transform)


SETS: dict[str, ImageSet] = {
    "cifar10": ImageSet(_torchvision("CIFAR10", (True, False), "train"), 10),
    "cifar100": ImageSet(_torchvision("CIFAR100", (True, False), "train"), 100),
    "pets": ImageSet(_torchvision("OxfordIIITPet", ("trainval", "test")), 37),
    # The official training split has ten images a class; the validation split of the same size is trained on too.
    "flowers102": ImageSet(_torchvision("Flowers102", ("train", "test"), parts=("val",)), 102),
    "cub200": ImageSet(_cub, 200),
    "mini_imagenet": ImageSet(_mini, 100),
    "mnist": ImageSet(_torchvision("MNIST", (True, False), "train"), 10),
    "fashion_mnist": ImageSet(_torchvision("FashionMNIST", (True, False), "train"), 10),
    "svhn": ImageSet(_torchvision("SVHN", ("train", "test")), 10),
    "not_mnist": ImageSet(_letters, 10),
    "packaged_mnist": ImageSet(_packaged_mnist, 10),
    "packaged_digits": ImageSet(_packaged_digits, 10),
    "packaged_photographs": ImageSet(_packaged_photographs, 8),
}
"""The packaged ones need no folder and no network."""


def load_set(
    name: str, root: str | Path = "data", train: bool = True, transform: Transform | None = None, download: bool = False
) -> Any:
    """One of :data:`SETS`.

    Args:
        name: its key.
        root: folder that holds it.
        train: its training images; otherwise its test images.
        transform: applied to each `PIL.Image`.
        download: fetch it with torchvision where it is not there; CUB, MiniImageNet and notMNIST cannot be.

    Returns:
        A map-style dataset of `(image, label)`, labels from 0.

    Raises:
        ValueError: there is no set of that name.
        FileNotFoundError: it is not there, or not whole.
    """
    if name not in SETS:
        raise ValueError(f"name={name!r} is not an image set. Allowed: {', '.join(SETS)}.")
    return SETS[name].load(Path(root), train, transform, download)


def targets_of(dataset: Any) -> list[int]:
    """The labels of a dataset, without its images where it knows them."""
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(label) for label in found]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return [label for part in dataset.datasets for label in targets_of(part)]
    return [int(dataset[index][1]) for index in range(len(dataset))]
