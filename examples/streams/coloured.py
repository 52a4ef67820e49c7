"""Coloured digits: the 1,797 digits of 8×8 pixels that scikit-learn ships, in other colours for each task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.streams.experiences import Experience, benchmark

CLASSES = 10


def coloured_digits(experiences: int = 8, seed: int = 0, train_size: int = 1200, multi_head: bool = True) -> Any:
    """The same digits, in each experience with ink, paper, a pattern and a quarter turn of its own, and other labels.

    The colour of the paper holds most of the energy of an image, and says nothing about its class.

    Args:
        experiences: length of the stream.
        seed: of the split, the colours, the turns, the order of the labels and the noise.
        train_size: training images of each experience; the others are its test images.
        multi_head: see :func:`examples.streams.experiences.benchmark`.
    """
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(found) for found in load_digits(return_X_y=True))
    if not CLASSES <= train_size <= len(labels) - CLASSES:
        raise ValueError(f"train_size={train_size}: there are {len(labels)} images for both sets. Allowed: 10 to 1787.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    ink, labels = images[order].view(-1, 1, 8, 8).float() / 16, labels[order]
    parts: tuple[list[Experience], list[Experience]] = ([], [])
    for _ in range(experiences):
        found = _scene(ink, generator)
        names = torch.randperm(CLASSES, generator=generator)[labels]
        for part, piece in zip(parts, (slice(train_size), slice(train_size, None)), strict=True):
            part.append((found[piece], names[piece]))
    return benchmark(*parts, multi_head)


def _scene(ink: Tensor, generator: torch.Generator) -> Tensor:
    """All digits `(n, 1, 8, 8)` as `(n, 3, 8, 8)`, in one scene."""
    colour, paper = torch.randn(2, 3, 1, 1, generator=generator)
    pattern = 0.5 * torch.randn(3, 8, 8, generator=generator)
    strength = torch.randn(len(ink), 1, 1, 1, generator=generator)
    noise = 0.3 * torch.randn(len(ink), 3, 8, 8, generator=generator)
    turn = int(torch.randint(4, (1,), generator=generator))
    return torch.rot90(ink * colour + paper + pattern * strength + noise, turn, (2, 3))
