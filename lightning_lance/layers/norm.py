"""Batch normalisation whose statistics and weight are fixed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops.norm import fixed_batch_norm
from lightning_lance.ops.tracking import tracked


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class CompactBatchNorm(Variant):
    """:class:`torch.nn.BatchNorm1d`, 2d and 3d that keep nothing in eval mode with a frozen weight.

    With a trainable weight the stock operator runs: its gradient needs the input. So it does with batch statistics.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    training: bool
    _check_input_dim: Any

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        frozen = self.weight is None or not self.weight.requires_grad
        if not self.training and mean is not None and var is not None and frozen and tracked(input):
            self._check_input_dim(input)
            return fixed_batch_norm(input, self.weight, self.bias, mean, var, self.eps)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]
