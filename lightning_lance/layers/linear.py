"""Linear layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import register
from lightning_lance.ops.linear import LowRankLinear
from lightning_lance.subspaces.subspace import Sizes


@register(nn.Linear)
class CompressedLinear(Compressed):
    """:class:`torch.nn.Linear` on inputs ``(B, *tokens, K)``; a single vector takes the stock path."""

    channel_axis: ClassVar[int] = -1
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def sizes(input: Tensor) -> Sizes:
        return tuple(input.shape[1:-1])

    def lance_work(self) -> float:
        return self.out_features

    def lance_outputs(self) -> float:
        return self.out_features / self.in_features

    def lance_pointwise(self) -> bool:
        return True

    def forward(self, input: Tensor) -> Tensor:
        output = self.lance_output(LowRankLinear, input, self.weight, self.bias)
        if output is None:
            stock: Any = super()
            output = stock.forward(input)
        return output
