"""Activations whose derivative takes two values: one bit per element."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops import activation
from lightning_lance.ops.tracking import tracked


@register(nn.ReLU)
class CompactReLU(Variant):
    """:class:`torch.nn.ReLU` that keeps 1 bit per element."""

    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input):
            return activation.relu(input, self.inplace)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.Hardtanh, nn.ReLU6)
class CompactHardtanh(Variant):
    """:class:`torch.nn.Hardtanh` and :class:`torch.nn.ReLU6` that keep 1 bit per element."""

    min_val: float
    max_val: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input):
            return activation.hardtanh(input, self.min_val, self.max_val, self.inplace)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.LeakyReLU)
class CompactLeakyReLU(Variant):
    """:class:`torch.nn.LeakyReLU` that keeps 1 bit per element."""

    negative_slope: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input):
            return activation.leaky_relu(input, self.negative_slope, self.inplace)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.Hardsigmoid)
class CompactHardsigmoid(Variant):
    """:class:`torch.nn.Hardsigmoid` that keeps 1 bit per element."""

    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input):
            return activation.hardsigmoid(input, self.inplace)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]
