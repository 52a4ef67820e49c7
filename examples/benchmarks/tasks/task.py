"""What a task of the learning suite is: data, a network, how it is trained and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pairs: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets, a sample in each row."""


class Data(NamedTuple):
    """Training and test pairs, the same for every seed."""

    train: Pairs
    test: Pairs


class Measure(NamedTuple):
    """What is learned.

    Attributes:
        name: of the score.
        loss: of outputs and targets.
        score: of the outputs of all test samples and their targets, in per cent; more is better.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        title: what is trained, and how.
        build: makes the network, with the trained parameters requiring grad, from torch's global generator.
        data: makes the data.
        measure: loss and score.
        optimizer: makes the optimiser at the peak of a one-cycle schedule.
        epochs: length of a run.
        batch: samples a step.
        seeds: how many runs; more where runs are short, for the spread.
        segments: names of modules that checkpointing computes again.
        layers: name patterns of the layers that may be projected.
        fine_tuning: whether the network begins with trained weights.
        published: whether it has a layer that the published method projects.
        trains_norms: whether norms are in training mode.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    measure: Measure
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    batch: int
    seeds: int
    segments: Sequence[str]
    layers: str | Sequence[str] = "trainable"
    fine_tuning: bool = False
    trains_norms: bool = True
    published: bool = True


def sgd(rate: float, momentum: float = 0.9) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum)


def adamw(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def _right(outputs: Tensor, targets: Tensor) -> float:
    return 100 * (outputs.argmax(-1) == targets).double().mean().item()


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _overlap(outputs: Tensor, targets: Tensor) -> float:
    """Intersection over union, mean over classes."""
    found = outputs.argmax(1)
    shares = []
    for kind in range(outputs.shape[1]):
        ours, true = found == kind, targets == kind
        shares.append((ours & true).sum().item() / max(1, (ours | true).sum().item()))
    return 100 * sum(shares) / len(shares)


def _explained(outputs: Tensor, targets: Tensor) -> float:
    """How much of the variance about the mean image a reconstruction explains."""
    left = F.mse_loss(outputs.double(), targets.double())
    return 100 * (1 - (left / targets.double().var(0, correction=0).mean()).item())


ACCURACY = Measure("accuracy", _cross_entropy, _right)
NEXT_CHARACTER = Measure("next character right", _cross_entropy, _right)
OVERLAP = Measure("mean IoU", F.cross_entropy, _overlap)
EXPLAINED = Measure("variance explained", F.mse_loss, _explained)
