"""The AlexNet-style network of the Split CIFAR-100 experiments of GPM (Saha, Garg & Roy, ICLR 2021, appendix)."""

from __future__ import annotations

from torch import nn


class GPMAlexNet(nn.Sequential):
    """Three convolutions and two linear layers without biases, each with batch norm, ReLU and dropout.

    The batch norms keep no running statistics: they normalise with the batch in evaluation too. A batch must hold more
    than one image.

    Args:
        channels: of the input.
        size: height and width of the input.
        width: fraction of the published widths (convolutions 64, 128, 256; linear layers 2048, 2048).
        drop_rates: of the first two convolutions, and of the layers after them.
        groups: normalise in that many groups of channels of each image, with group norm, instead of over the batch.
            A batch that mixes tasks, as in replay and joint training, has other statistics than one of a single task.

    Attributes:
        features: width of the output.
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        width: float = 1.0,
        drop_rates: tuple[float, float] = (0.2, 0.5),
        groups: int | None = None,
    ) -> None:
        early, late = drop_rates
        first, second, third, hidden = (max(1, round(full * width)) for full in (64, 128, 256, 2048))
        layers: list[nn.Module] = []

        def add(layer: nn.Module, outputs: int, batch_norm: type[nn.Module], drop_rate: float) -> None:
            norm = batch_norm(outputs, track_running_stats=False) if groups is None else nn.GroupNorm(groups, outputs)
            layers.extend([layer, norm, nn.ReLU(), nn.Dropout(drop_rate)])

        plan = [(channels, first, 4, early), (first, second, 3, early), (second, third, 2, late)]
        for inputs, outputs, kernel, drop_rate in plan:
            add(nn.Conv2d(inputs, outputs, kernel, bias=False), outputs, nn.BatchNorm2d, drop_rate)
            layers.append(nn.MaxPool2d(2))
            size = (size - kernel + 1) // 2
        layers.append(nn.Flatten())
        for inputs in (third * size * size, hidden):
            add(nn.Linear(inputs, hidden, bias=False), hidden, nn.BatchNorm1d, late)
        super().__init__(*layers)
        self.features = hidden
