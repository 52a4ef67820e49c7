"""Small trunks for digits. Those without biases and norms are protected whole by bases of their inputs."""

from __future__ import annotations

from torch import nn


def mlp_trunk(inputs: int = 784, hidden: int = 100) -> nn.Sequential:
    """Two hidden layers, as GPM uses for permuted MNIST: `(B, ...)` to `(B, hidden)`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.ReLU(),
    )


def conv_trunk(channels: int = 1, width: int = 16, size: int = 28, features: int = 128) -> nn.Sequential:
    """Two convolutions and a linear layer: `(B, channels, size, size)` to `(B, features)`."""
    side = ((size - 2) // 2 - 2) // 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, features, bias=False),
        nn.ReLU(),
    )


def norm_trunk(channels: int = 3, width: int = 16) -> nn.Sequential:
    """Three convolutions with biases and batch norms: `(B, channels, size, size)` to `(B, 8 width)`."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
