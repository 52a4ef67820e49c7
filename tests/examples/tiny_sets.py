"""Tiny image sets in the true on-disk formats, with random pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import cifar, flowers102, svhn

from tests.examples.test_avalanche_benchmark import pixels, write_cifar10, write_cifar100, write_fashion, write_mnist


def accept_tiny_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision compares checksums with those of the whole sets."""
    for module in (cifar, flowers102, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def save_image(path: Path, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(*shape)).save(path)


def write_pets(root: Path) -> None:
    """`annotations/{trainval,test}.txt`: image, class from 1, species, breed."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, per_class in (("trainval", 2), ("test", 1)):
        lines = []
        for label in range(1, 38):
            for index in range(per_class):
                name = f"breed_{label}_{split}_{index}"
                save_image(folder / "images" / f"{name}.jpg", 20, 30, 3)
                lines.append(f"{name} {label} 1 {label}")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_flowers(root: Path) -> None:
    """MATLAB files of the labels (from 1) and of the image numbers of each split."""
    folder = root / "flowers-102"
    labels = np.tile(np.arange(1, 103), 3)
    for number in range(1, len(labels) + 1):
        save_image(folder / "jpg" / f"image_{number:05d}.jpg", 16, 20, 3)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    numbers = np.arange(1, 307)[None]
    savemat(folder / "setid.mat", {"trnid": numbers[:, :102], "valid": numbers[:, 102:204], "tstid": numbers[:, 204:]})


def write_cub(root: Path, classes: int = 200) -> None:
    """Images of several sizes, three of each class, the last of them for the test."""
    folder = root / "CUB_200_2011"
    lists: dict[str, list[str]] = {"classes": [], "images": [], "image_class_labels": [], "train_test_split": []}
    number = 0
    for label in range(1, classes + 1):
        lists["classes"].append(f"{label} {label:03d}.Some_bird_{label}")
        for index in range(3):
            number += 1
            path = f"{label:03d}.Some_bird_{label}/Some_bird_{label}_{index:04d}.jpg"
            save_image(folder / "images" / path, 12, 10 + index, 3)
            lists["images"].append(f"{number} {path}")
            lists["image_class_labels"].append(f"{number} {label}")
            lists["train_test_split"].append(f"{number} {int(index < 2)}")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_mini_imagenet(root: Path, per_class: int = 12) -> None:
    for label in range(100):
        for index in range(per_class):
            save_image(root / f"n{label:08d}" / f"n{label:08d}_{index:04d}.jpg", 20, 24, 3)


def write_svhn(root: Path) -> None:
    """Labels from 1 to 10, where 10 is the digit 0; images last in the array."""
    for name, count in (("train", 40), ("test", 20)):
        savemat(root / f"{name}_32x32.mat", {"X": pixels(32, 32, 3, count), "y": (np.arange(count) % 10 + 1)[:, None]})


def write_not_mnist(root: Path, per_class: int = 10) -> None:
    for letter in "ABCDEFGHIJ":
        for index in range(per_class):
            save_image(root / "notMNIST_small" / letter / f"{index:03d}.png", 28, 28)


WRITERS: dict[str, Any] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "pets": write_pets,
    "flowers102": write_flowers,
    "cub200": write_cub,
    "mini_imagenet": write_mini_imagenet,
    "mnist": write_mnist,
    "fashion_mnist": write_fashion,
    "svhn": write_svhn,
    "not_mnist": write_not_mnist,
}
