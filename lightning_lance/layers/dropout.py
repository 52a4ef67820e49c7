"""Dropout of single elements; dropout of whole channels keeps little anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops.dropout import dropout, replaceable
from lightning_lance.ops.tracking import tracked


@register(nn.Dropout)
class CompactDropout(Variant):
    """:class:`torch.nn.Dropout` that keeps 1 bit per element, from the same random draws."""

    p: float
    inplace: bool
    training: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.training and tracked(input) and replaceable(input, self.p):
            return dropout(input, self.p, self.inplace)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]
