"""Caltech-UCSD Birds 200-2011 from its unpacked archive: 11,788 photographs of 200 kinds of birds.

Source of the set and its format: Wah, Branson, Welinder, Perona & Belongie, *The Caltech-UCSD Birds-200-2011 Dataset*,
Technical Report CNS-TR-2011-001, California Institute of Technology, 2011. torchvision has no loader for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

FOLDER = "CUB_200_2011"
LISTS = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
"""Files of the archive, each with one `NUMBER VALUE` a line, numbers from 1."""

NAMED = 3
"""Missing images that a message names."""


class CUB200(Dataset[tuple[Any, int]]):
    """The photographs of one of the two official splits.

    Args:
        root: folder that holds `CUB_200_2011/`, as the archive unpacks.
        train: the 5,994 training images; otherwise the 5,794 test images.
        transform: applied to each RGB `PIL.Image`.

    Attributes:
        classes: their names, in the order of the labels.
        targets: label of each image, from 0.

    Raises:
        FileNotFoundError: a list or an image is missing; the message names it.
        ValueError: a list is cut or holds something else; the message names the file and the line.
    """

    def __init__(self, root: str | Path, train: bool = True, transform: Callable[[Any], Any] | None = None) -> None:
        self.folder = Path(root) / FOLDER
        self.transform = transform
        missing = [name for name in LISTS if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {', '.join(missing)}. Needed: {', '.join(LISTS)} and images/, as in the archive "
                f"CUB_200_2011.tgz; unpack it in {root}."
            )
        names, paths, labels, splits = (_numbered(self.folder / name) for name in LISTS)
        classes = {number: index for index, number in enumerate(sorted(names))}
        for name, found in ((LISTS[2], labels), (LISTS[3], splits)):
            other = sorted(paths.keys() ^ found.keys())
            if other:
                raise ValueError(
                    f"{self.folder / name} has {len(found)} images and {LISTS[1]} has {len(paths)}; image {other[0]} "
                    "is in one of them only. Unpack the archive again."
                )
        self.classes = [names[number] for number in classes]
        self.paths: list[Path] = []
        self.targets: list[int] = []
        for number, path in paths.items():
            label, split = _number(labels[number]), splits[number]
            if label not in classes:
                raise ValueError(
                    f"{self.folder / LISTS[2]}: image {number} has class {labels[number]!r}. Allowed: a number of "
                    f"{LISTS[0]}, which has {len(classes)}."
                )
            if split not in ("0", "1"):
                raise ValueError(
                    f"{self.folder / LISTS[3]}: image {number} has {split!r}. Allowed: 1 for training, 0 for test."
                )
            if (split == "1") == train:
                self.paths.append(self.folder / "images" / path)
                self.targets.append(classes[label])
        gone = [path for path in self.paths if not path.is_file()]
        if gone:
            shown = ", ".join(map(str, gone[:NAMED])) + (" ..." if len(gone) > NAMED else "")
            raise FileNotFoundError(
                f"{len(gone)} of {len(self.paths)} images are missing: {shown}. Unpack the archive again."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); it may be cut. Unpack the archive again.") from error
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _numbered(path: Path) -> dict[int, str]:
    """The values of a list by their number."""
    found: dict[int, str] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        number, _, value = text.strip().partition(" ")
        if not number.isdigit() or not value:
            raise ValueError(
                f"{path}, line {line}, is {text!r}. Allowed: a number, a space and a value. The file may be cut; "
                "unpack the archive again."
            )
        found[int(number)] = value.strip()
    if not found:
        raise ValueError(f"{path} is empty. Unpack the archive again.")
    return found


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1
