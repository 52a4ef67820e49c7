"""Linear layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import register
from lightning_lance.ops.linear import low_rank_linear
from lightning_lance.ops.tracking import refuse_transforms
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
        if input.dim() > 1:
            self.lance_observe(input)
            if torch.is_grad_enabled() and self.weight.requires_grad:
                if self._lance.subspace is not None:
                    refuse_transforms(self._lance.name)
                kept = self.lance_core(input)
                if kept is not None:
                    core, factors = kept
                    return self.lance_run(low_rank_linear, input, factors, self.weight, self.bias, core, factors)
        stock: Any = super()
        result: Tensor = stock.forward(input)
        return result
