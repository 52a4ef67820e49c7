"""An activation that passes gradients or stops them, whose backward pass reads one bit an element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.saving import lent


class Gate(torch.autograd.Function):
    """The stock operator; its backward pass takes what is lent in the place of what was saved, where it can.

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
        # As the stock operators, but for a copy of what is written over: the result says as much.
        ctx.save_for_backward(result if inplace or high is None else input)
        ctx.bounds = low, high
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, (saved,) = lent(ctx, "gate")
        found = None
        if kept is not None:
            found = kept.gate(grad)
            if found is None:
                saved = kept.restore()
        if found is None:
            low, high = ctx.bounds
            found = (
                torch.ops.aten.threshold_backward(grad, saved, low)
                if high is None
                else torch.ops.aten.hardtanh_backward(grad, saved, low, high)
            )
        return found, None, None, None, None
