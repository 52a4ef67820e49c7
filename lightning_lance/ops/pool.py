"""A max pooling that keeps the places of maxima in their windows, and whose backward pass reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lance.tensors import places


class MaxPool(torch.autograd.Function):
    """Max pooling on two axes, bit for bit as the stock operator; saves places in the place of indices.

    Args:
        input: ``(..., H, W)``, contiguous, with at most one axis before channels.
        window: static arguments.
        ceil_mode: as that of :func:`torch.nn.functional.max_pool2d`.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: places.Window, ceil_mode: bool) -> Tensor:
        found = places.pool(input, window, ceil_mode)
        if found is None:
            result, index = torch.ops.aten.max_pool2d_with_indices(input, *window, ceil_mode)
            found = result, places.pack(index.contiguous(), tuple(input.shape[-2:]), window)
        result, codes = found
        ctx.save_for_backward(codes, input)
        ctx.arguments = *window, ceil_mode
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        codes, input = ctx.saved_tensors
        *numbers, ceil_mode = ctx.arguments
        window, sizes = places.Window(*numbers), tuple(input.shape[-2:])
        found = None if torch.is_grad_enabled() else places.scatter(codes, grad, sizes, window)
        if found is None:
            shape = (*input.shape[:-2], *places.out_sizes(sizes, window, ceil_mode))
            stride = torch.empty(shape, device="meta").stride()
            index = places.unpack(codes, shape, stride, sizes, window)
            found = torch.ops.aten.max_pool2d_with_indices_backward(grad, input, *window, ceil_mode, index)
        return found, None, None
