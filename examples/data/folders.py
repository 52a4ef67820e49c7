"""Sets that are folders of images: MiniImageNet and notMNIST."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
"""Of image files, in lower case."""

MINI_CLASSES, MINI_PER_CLASS, MINI_TRAINED = 100, 600, 500
"""MiniImageNet: 100 classes of ImageNet, 600 images each, of which 500 are trained on in streams."""

NOT_MNIST = "ABCDEFGHIJ"
"""Classes of notMNIST: ten letters."""


class ImageFiles(Dataset[tuple[Any, int]]):
    """Image files with labels.

    Args:
        paths: files.
        targets: label of each.
        classes: names of the labels.
        mode: of the images, `"RGB"` or `"L"`.
        transform: applied to each `PIL.Image`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        targets: Sequence[int],
        classes: Sequence[str],
        mode: str = "RGB",
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.paths, self.targets, self.classes = list(paths), list(targets), list(classes)
        self.mode = mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert(self.mode)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}). Replace or remove it.") from error
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def images_of(folder: Path) -> list[Path]:
    """The image files of a folder and of those in it, by name; files of no bytes are left out, with a warning."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    empty = [path for path in found if path.stat().st_size == 0]
    if empty:
        warnings.warn(f"{len(empty)} image files of no bytes are left out, such as {empty[0]}.", stacklevel=3)
    return [path for path in found if path not in empty]


def mini_imagenet(root: str | Path, train: bool = True, transform: Callable[[Any], Any] | None = None) -> ImageFiles:
    """MiniImageNet (Vinyals et al., *Matching Networks for One Shot Learning*, NeurIPS 2016) for streams.

    Args:
        root: a prepared folder. Either `train/` and `test/`, each with a folder of images for each class; or a folder
            of images for each class, of whose first 600 by name 500 are trained on and the others tested on; of fewer,
            the first five sixths. With a file `classes.txt`, one class a line, only those are taken: the folder `train`
            of ImageNet will do, with such a file of the 100 classes in it.
        train: the training images; otherwise the test images.
        transform: applied to each RGB `PIL.Image`.

    Returns:
        Images and labels, the classes in the order of `classes.txt`, or of their names.

    Raises:
        FileNotFoundError: there is no such folder, a class of the file has none, or a class has no images.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give that of MiniImageNet: a folder of images a class.")
    split = folder / ("train" if train else "test")
    prepared = (folder / "train").is_dir() and (folder / "test").is_dir()
    source = split if prepared else folder
    listed = folder / "classes.txt"
    if listed.is_file():
        names = listed.read_text(encoding="utf-8").split()
    else:
        names = sorted(path.name for path in source.iterdir() if path.is_dir())
    if not names:
        raise FileNotFoundError(f"{source} holds no folder. Allowed: a folder of images for each class.")
    paths: list[Path] = []
    targets: list[int] = []
    for label, name in enumerate(names):
        own = images_of(source / name) if (source / name).is_dir() else []
        if not prepared:
            own = own[:MINI_PER_CLASS]
            trained = len(own) * MINI_TRAINED // MINI_PER_CLASS
            own = own[:trained] if train else own[trained:]
        if not own:
            what = "training" if train else "test"
            raise FileNotFoundError(
                f"{source / name} has no {what} images. Needed: some for each of {len(names)} classes."
            )
        paths += own
        targets += [label] * len(own)
    return ImageFiles(paths, targets, names, "RGB", transform)


def not_mnist(
    root: str | Path, train: bool = True, transform: Callable[[Any], Any] | None = None, test_part: int = 10
) -> ImageFiles:
    """NotMNIST (Y. Bulatov, 2011): glyphs of ten letters, 28×28, from the unpacked archive.

    Args:
        root: folder that holds `A/` to `J/`, or `notMNIST_small/` or `notMNIST_large/` with these. With `Train/` and
            `Test/` in it, each with these, they are the two sets.
        train: the training images; otherwise the test images.
        transform: applied to each grey `PIL.Image`.
        test_part: otherwise, of the images of each letter by name, every so many-th is tested on.

    Returns:
        Images and labels; the few files of no bytes that the archive holds are left out, with a warning.

    Raises:
        FileNotFoundError: the folder of a letter is missing or holds no images; the message names it.
    """
    folder = Path(root)
    for name in ("notMNIST_small", "notMNIST_large"):
        if (folder / name).is_dir():
            folder = folder / name
            break
    split = folder / ("Train" if train else "Test")
    prepared = split.is_dir()
    folder = split if prepared else folder
    missing = [letter for letter in NOT_MNIST if not (folder / letter).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the folders {', '.join(missing)}. Needed: a folder for each of A to J."
        )
    paths: list[Path] = []
    targets: list[int] = []
    for label, letter in enumerate(NOT_MNIST):
        own = images_of(folder / letter)
        if not prepared:
            own = [path for index, path in enumerate(own) if (index % test_part == test_part - 1) != train]
        if not own:
            raise FileNotFoundError(f"{folder / letter} has no images. Unpack the archive again.")
        paths += own
        targets += [label] * len(own)
    return ImageFiles(paths, targets, NOT_MNIST, "L", transform)
