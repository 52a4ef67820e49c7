"""The paper's streams of images: Split CIFAR-100, Split MiniImageNet, 5-Datasets, each with a validation set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.mnist import stratified_split
from examples.data.sets import SETS, load_set, targets_of

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""Of the pixels of CIFAR-100's training set."""

FIVE = ("cifar10", "mnist", "svhn", "fashion_mnist", "not_mnist")
"""The 5-Datasets stream (Ebrahimi et al., *Adversarial Continual Learning*, ECCV 2020), in this order."""

MEASURED = 1000
"""Images that the mean and deviation of a set are computed from."""


class Part(Dataset[tuple[Any, int]]):
    """Some samples of a dataset, with labels of their own.

    Args:
        dataset: of `(image, label)`.
        indices: of the samples.
        labels: new label of each.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], labels: Sequence[int]) -> None:
        self.dataset, self.indices, self.targets = dataset, list(indices), list(labels)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[self.indices[index]][0], self.targets[index]


class Experience(NamedTuple):
    """Training, validation and test samples of one experience."""

    train: Part
    valid: Part
    test: Part


def split_cifar100(
    root: str = "data", experiences: int = 10, seed: int = 0, validation: float = 0.05, download: bool = False
) -> Any:
    """CIFAR-100 in experiences of equally many classes, in an order drawn from the seed; a head for each.

    Args:
        root: folder that holds `cifar-100-python/`.
        experiences: length of the stream.
        seed: of the order of the classes and of the split.
        validation: share of each class of the training images that is held out.
        download: fetch the set where it is not there.
    """
    return _split("cifar100", root, experiences, seed, validation, 32, (CIFAR_MEAN, CIFAR_STD), download)


def split_mini_imagenet(
    root: str = "data/mini_imagenet", experiences: int = 20, seed: int = 0, validation: float = 0.05, size: int = 84
) -> Any:
    """MiniImageNet in experiences of equally many classes, in an order drawn from the seed; a head for each.

    Args:
        root: a prepared folder, see :func:`examples.data.folders.mini_imagenet`.
        experiences: length of the stream.
        seed: of the order of the classes and of the split.
        validation: share of each class of the training images that is held out.
        size: height and width of the images.
    """
    from examples.data.photographs import MEAN, STD

    return _split("mini_imagenet", root, experiences, seed, validation, size, (MEAN, STD), False)


def five_datasets(
    root: str = "data", seed: int = 0, validation: float = 0.05, download: bool = False, letters: str | None = None
) -> Any:
    """CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST, one after the other, as RGB of 32 pixels; a head for each.

    Args:
        root: folder that holds them, as torchvision lays them out.
        seed: of the split.
        validation: share of each class of the training images that is held out.
        download: fetch those that torchvision can where they are not there.
        letters: folder of notMNIST, which has no download; `root` by default.
    """
    found = []
    for task, name in enumerate(FIVE):
        folder = letters if name == "not_mnist" and letters is not None else root
        plain = load_set(name, folder, True, _transform(32, None), download)
        transform = _transform(32, normalization(plain))
        train, test = (load_set(name, folder, train, transform, download) for train in (True, False))
        found.append(_experience(train, test, list(range(SETS[name].classes)), validation, seed + task))
    return _benchmark(found)


def normalization(dataset: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, `(3,)` each, of evenly spaced images of a dataset of tensors."""
    step = max(len(dataset) // MEASURED, 1)
    pixels = torch.stack([dataset[index][0] for index in range(0, len(dataset), step)]).transpose(0, 1).flatten(1)
    return pixels.mean(1), pixels.std(1).clamp(min=1e-3)


def _split(
    name: str,
    root: str,
    experiences: int,
    seed: int,
    validation: float,
    size: int,
    pixels: tuple[Any, Any],
    download: bool,
) -> Any:
    classes = SETS[name].classes
    if experiences < 1 or classes % experiences:
        raise ValueError(f"experiences={experiences!r} is not allowed. Allowed: a divisor of the {classes} classes.")
    transform = _transform(size, pixels)
    train, test = (load_set(name, root, train, transform, download) for train in (True, False))
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).view(experiences, -1)
    return _benchmark([_experience(train, test, own.tolist(), validation, seed) for own in order])


def _experience(train: Any, test: Any, classes: list[int], validation: float, seed: int) -> Experience:
    """The samples of some classes; labels count from 0 in the order of `classes`."""
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation={validation!r} is not allowed. Allowed: a share in (0, 1), such as 0.05.")
    position = {label: index for index, label in enumerate(classes)}

    def part(dataset: Any, indices: Sequence[int], labels: Sequence[int]) -> Part:
        return Part(dataset, indices, [position[labels[index]] for index in indices])

    labels = {id(found): targets_of(found) for found in (train, test)}
    own = {key: [index for index, label in enumerate(found) if label in position] for key, found in labels.items()}
    known, mine = labels[id(train)], torch.tensor(own[id(train)])
    held, rest = stratified_split(torch.tensor([known[index] for index in mine.tolist()]), [validation], seed)
    return Experience(
        part(train, mine[rest].tolist(), known),
        part(train, mine[held].tolist(), known),
        part(test, own[id(test)], labels[id(test)]),
    )


def _benchmark(experiences: list[Experience]) -> Any:
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

    streams: dict[str, list[Any]] = {name: [] for name in Experience._fields}
    for task, experience in enumerate(experiences):
        for name, part in zip(Experience._fields, experience, strict=True):
            if not len(part):
                raise ValueError(f"experience {task} has no {name} samples. Give more images, or a larger validation.")
            # as_taskaware_classification_dataset takes no task labels.
            streams[name].append(_make_taskaware_classification_dataset(part, task_labels=task, targets=part.targets))
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))


def _transform(size: int, pixels: tuple[Any, Any] | None) -> Any:
    from torchvision import transforms

    steps: list[Any] = [transforms.Lambda(_rgb), transforms.Resize((size, size), antialias=True), transforms.ToTensor()]
    return transforms.Compose(steps if pixels is None else [*steps, transforms.Normalize(*pixels)])


def _rgb(image: Any) -> Any:
    return image.convert("RGB")
