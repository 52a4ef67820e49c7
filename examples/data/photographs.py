"""Natural images without a download: random crops of the two photographs that scikit-learn ships."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 8
"""Photograph (2) times quadrant of the crop's centre (4)."""

# Of the ImageNet training set, which the networks of torchvision expect to be taken out.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SMALLEST, LARGEST = 0.25, 0.9  # side of a crop as a fraction of the photograph's height


@functools.cache
def load_photographs() -> Tensor:
    """The photographs "china" and "flower" of scikit-learn: `(2, 3, 427, 640)` bytes."""
    from sklearn.datasets import load_sample_images

    return torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images]).permute(0, 3, 1, 2)


def photograph_batch(batch_size: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random crops of random size and place, half of them flipped, resized and normalised.

    Args:
        batch_size: samples.
        image_size: height and width in pixels.
        seed: of the crops, independent of any global generator.

    Returns:
        Images `(B, 3, S, S)`, float32, and labels `(B,)` from 0 to `CLASSES` - 1: which photograph, and in which
        quadrant of it the crop has its centre.
    """
    photographs = load_photographs()
    height, width = photographs.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(batch_size, 5, generator=generator).tolist()
    images, labels = [], []
    for which, scale, down, across, flip in draws:
        index = int(which * len(photographs))
        side = round(height * (SMALLEST + (LARGEST - SMALLEST) * scale))
        top, left = round(down * (height - side)), round(across * (width - side))
        crop = photographs[index : index + 1, :, top : top + side, left : left + side].float()
        crop = F.interpolate(crop, (image_size, image_size), mode="bilinear", antialias=True, align_corners=False)
        images.append(crop.flip(-1) if flip < 0.5 else crop)
        labels.append(index * 4 + 2 * (top + side / 2 > height / 2) + (left + side / 2 > width / 2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (torch.cat(images) / 255 - mean) / std, torch.tensor(labels)
