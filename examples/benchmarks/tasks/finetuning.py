"""EfficientNet-Lite0 with the ImageNet weights that its package ships, fine-tuned on handwritten digits."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.benchmarks.tasks.images import mnist, small_digits
from examples.benchmarks.tasks.task import ACCURACY, Data, Pairs, Task, adamw, sgd
from examples.data.mnist import CLASSES
from examples.models.efficientnet_lite0 import efficientnet_lite0

FRONT = 14
"""Blocks before the last four pointwise convolutions: frozen, and so computed once for all runs."""

TAIL_LAYERS = ("blocks.14.project.0", "blocks.15.expand.0", "blocks.15.project.0", "head.0")


class Tail(nn.Module):
    """What follows the frozen front, with the last four pointwise convolutions and the classifier to be trained."""

    def __init__(self) -> None:
        super().__init__()
        whole = efficientnet_lite0(pretrained=True, num_classes=CLASSES)
        self.blocks, self.head, self.pool = whole.blocks[FRONT:], whole.head, whole.pool
        self.classifier = whole.classifier
        self.requires_grad_(False)
        for name in TAIL_LAYERS:
            self.get_submodule(name).requires_grad_(True)
        self.classifier.requires_grad_(True)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(features))).flatten(1))  # type: ignore[no-any-return]


@torch.no_grad()
def _features(images: Callable[[], Data], name: str) -> Data:
    """What the front makes of the images; kept in a file, since each run has a process of its own."""
    path = Path(tempfile.gettempdir()) / f"lightning_lance_{name}_{torch.__version__}_{FRONT}.pt"
    if path.exists():
        return Data(*torch.load(path, weights_only=True))
    front = efficientnet_lite0(pretrained=True, num_classes=CLASSES).eval()

    def through(pairs: Pairs) -> Pairs:
        inputs, labels = pairs
        return torch.cat([front.blocks[:FRONT](front.stem(part)) for part in inputs.split(64)]), labels

    found = Data(*map(through, images()))
    part = path.with_suffix(f".{torch.initial_seed()}.part")
    torch.save(tuple(found), part)
    part.replace(path)
    return found


def _all() -> nn.Module:
    return efficientnet_lite0(pretrained=True, num_classes=CLASSES)


def _last4(title: str, data: Callable[[], Data], name: str, epochs: int, batch: int, seeds: int) -> Task:
    return Task(
        title,
        Tail,
        functools.partial(_features, data, name),
        ACCURACY,
        sgd(0.02, momentum=0.0),  # at .05 and with fixed norms the loss of the first steps grows
        epochs=epochs,
        batch=batch,
        seeds=seeds,
        segments=["blocks.14", "blocks.15"],
        layers=TAIL_LAYERS,
        fine_tuning=True,
        trains_norms=False,
    )


lite0_last4 = _last4(
    "EfficientNet-Lite0, last 4, 112 px, SGD", functools.partial(mnist, 112), "mnist", epochs=4, batch=64, seeds=4
)

lite0_digits_last4 = _last4(
    "EfficientNet-Lite0, last 4, 8 × 8 digits at 112 px, SGD",
    functools.partial(small_digits, 112),
    "digits",
    epochs=6,
    batch=32,
    seeds=4,
)

lite0_all = Task(
    "EfficientNet-Lite0, all, 64 px, AdamW",
    _all,
    lambda: mnist(64),
    ACCURACY,
    adamw(2e-3),
    epochs=2,  # after one, plain training itself is half way: 74 to 87 by the seed
    batch=32,
    seeds=3,
    segments=[f"blocks.{index}" for index in range(16)],
    fine_tuning=True,
)
