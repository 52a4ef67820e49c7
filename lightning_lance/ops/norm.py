"""Batch normalisation with fixed statistics: an affine map, whose input gradient does not need the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import first_order_only


def _format(input: Tensor) -> torch.memory_format | None:
    """Memory format by which the stock backward kernel chooses its path; ``None`` for its slow general path."""
    if input.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if channels_last is not None and input.is_contiguous(memory_format=channels_last):
        return channels_last
    return None


class FixedBatchNorm(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with a frozen weight. Saved: the vectors only.

    ``apply(input, weight, bias, mean, var, eps)``.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.eps, ctx.format = eps, _format(input)
        ctx.save_for_backward(weight, mean, var)
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, var = ctx.saved_tensors
        # The stock kernel, whose formula differs by memory format and dtype. It reads the input for the gradient of
        # the weight alone, so that the gradient, or one element, stands in for it.
        asked = ctx.format is not None and not torch.compiler.is_compiling()
        same = asked and grad.is_contiguous(memory_format=ctx.format)
        stand_in = grad if same else grad.new_zeros(1).expand(grad.shape)
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        grad_input, _, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, stand_in, weight, mean, var, None, None, False, ctx.eps, wanted
        )
        if grad_input is not None and ctx.format is not None:
            grad_input = grad_input.contiguous(memory_format=ctx.format)
        return grad_input, None, grad_bias, None, None, None


def fixed_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` with ``training=False`` and a frozen weight, keeping nothing of the input.

    Args:
        input: ``(B, C, ...)``.
        weight: ``(C,)`` without a gradient, or ``None``.
        bias: ``(C,)``, which may need a gradient, or ``None``.
        mean: running mean ``(C,)``.
        var: running variance ``(C,)``.
        eps: added to the variance.

    Returns:
        Same shape and dtype as the input.
    """
    result: Tensor = FixedBatchNorm.apply(input, weight, bias, mean, var, eps)
    return result
