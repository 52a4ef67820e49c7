"""A smooth activation whose backward pass looks derivatives up, one for each level that its input was rounded to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.saving import lent


class Smooth(torch.autograd.Function):
    """The stock operator; its backward pass takes what is lent in the place of the input, where it can.

    Args:
        input: any shape.
        function: the operator.
        kernel: of its backward pass: from the gradients of the result and the input, that of the input.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, function: Callable[[Tensor], Tensor], kernel: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.function, ctx.kernel = function, kernel
        return function(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, (input,) = lent(ctx, "map")
        kernel = ctx.kernel
        if torch.is_grad_enabled():  # some kernels have no derivative
            own = input.view_as(input)  # of which nobody's hooks are asked
            return *torch.autograd.grad(ctx.function(own), own, grad, create_graph=True), None, None
        found = None
        if kept is not None:
            found = kept.map(lambda levels: kernel(levels.new_ones(()).expand_as(levels), levels), grad)
            if found is None:
                input = kept.restore()
        return kernel(grad, input) if found is None else found, None, None
