"""The offline streams of the continual benchmark, each with a network that fits and the settings to train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from examples.models.gpm_alexnet import GPMAlexNet
from examples.models.multi_head import MultiHead
from examples.models.small import conv_trunk, mlp_trunk, norm_trunk
from examples.streams.coloured import coloured_digits
from examples.streams.digits import permuted_mnist, rotated_digits, split_mnist
from examples.streams.glyphs import split_glyphs


def alexnet(**options: Any) -> MultiHead:
    """GPM's AlexNet with a head of ten classes per task."""
    trunk = GPMAlexNet(**options)
    return MultiHead(trunk, trunk.features, 10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MultiHead(mlp_trunk(), 100),
    "mlp-one-head": lambda: nn.Sequential(mlp_trunk(), nn.Linear(100, 10)),
    "conv": lambda: MultiHead(conv_trunk(), 128),
    "conv-norms": lambda: MultiHead(norm_trunk(), 128),
    "alexnet": alexnet,
    # For the few epochs and small data of a table that is made in minutes: no dropout, and a norm that does not care
    # which tasks a batch holds.
    "alexnet-quarter": lambda: alexnet(width=0.25, drop_rates=(0.0, 0.0), groups=4),
}


@dataclass(frozen=True)
class Recipe:
    """A stream and how to train on it.

    Attributes:
        stream: seed -> Avalanche benchmark.
        model: a key of :data:`MODELS`.
        epochs: over each experience.
        lr: learning rate of plain SGD.
        batch_size: samples of a training step.
        threshold: energy protected after an experience, in GPM, scaled GPM and TRGP; LANCE has its own default.
        method: options of single methods on this stream.
    """

    stream: Callable[[int], Any]
    model: str
    epochs: int
    lr: float
    batch_size: int = 32
    threshold: float = 0.97
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "split-mnist": Recipe(lambda seed: split_mnist(seed), "mlp", epochs=3, lr=0.05),
    "permuted-mnist": Recipe(lambda seed: permuted_mnist(seed=seed), "mlp", epochs=5, lr=0.05),
    "rotated-digits": Recipe(lambda seed: rotated_digits(seed=seed), "conv", epochs=3, lr=0.05),
    "glyphs": Recipe(lambda seed: split_glyphs(seed=seed), "alexnet-quarter", epochs=8, lr=0.05, threshold=0.975),
    # Nobody says which experience a sample is of: the same digits under permutations, and other digits each time.
    "permuted-mnist-one-head": Recipe(
        lambda seed: permuted_mnist(seed=seed, multi_head=False), "mlp-one-head", epochs=5, lr=0.05
    ),
    "split-mnist-one-head": Recipe(lambda seed: split_mnist(seed, multi_head=False), "mlp-one-head", epochs=3, lr=0.05),
    "coloured-digits": Recipe(lambda seed: coloured_digits(seed=seed), "conv-norms", epochs=4, lr=0.05),
}
