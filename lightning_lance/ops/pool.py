"""A max pooling whose backward pass reads the places of maxima in their windows as they are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.saving import lent


class MaxPool(torch.autograd.Function):
    """The stock operator on two axes; its backward pass takes what is lent in the place of the indices, where it can.

    ``apply(input, kernel_size, stride, padding, dilation, ceil_mode)``, as :func:`torch.nn.functional.max_pool2d`.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, *window: Any) -> Tensor:
        result: Tensor
        result, index = torch.ops.aten.max_pool2d_with_indices(input, *window)
        ctx.save_for_backward(index, input)
        ctx.window = window
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, (index, input) = lent(ctx)
        found = None
        if kept is not None:
            found = kept.scatter(grad)
            if found is None:
                index = kept.restore()
        if found is None:
            found = torch.ops.aten.max_pool2d_with_indices_backward(grad, input, *ctx.window, index)
        return found, *(None,) * 5
