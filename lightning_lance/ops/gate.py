"""An activation that passes gradients or stops them, whose backward pass reads one bit an element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.saving import lent


class Gate(torch.autograd.Function):
    """The stock operator; its backward pass takes what is lent in the place of the result, where it can.

    Args:
        input: any shape.
        function: the operator, which writes over its argument where the second one says so.
        inplace: whether it is to.
        low: gradients pass above it.
        high: and below it; ``None``: no bound.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        function: Callable[[Tensor, bool], Tensor],
        inplace: bool,
        low: float,
        high: float | None,
    ) -> Tensor:
        result = function(input, inplace)
        if inplace:
            ctx.mark_dirty(input)
        ctx.save_for_backward(result)
        ctx.bounds = low, high
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, (result,) = lent(ctx)
        found = None
        if kept is not None:
            found = kept.gate(grad)
            if found is None:
                result = kept.restore()
        if found is None:
            low, high = ctx.bounds
            found = (
                torch.ops.aten.threshold_backward(grad, result, low)
                if high is None
                else torch.ops.aten.hardtanh_backward(grad, result, low, high)
            )
        return found, None, None, None, None
