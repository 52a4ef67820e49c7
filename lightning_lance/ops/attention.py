"""Scaled dot-product attention that keeps queries, keys and values in 8 bits and computes itself again."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import first_order_only
from lightning_lance.ops.tracking import tracked
from lightning_lance.tensors.rounding import Quantized, dequantize, quantize

BITS = 8
# As an operator of the dispatcher: no function mode sees the call in the backward pass.
_attention: Any = torch.ops.aten.scaled_dot_product_attention.default


class RoundedAttention(torch.autograd.Function):
    """``softmax(q kᵀ · scale + mask) v``. The backward pass runs forward and backward of the stock operator.

    Saved: 8 bits and 1/8 byte per element of queries, keys and values, neither output nor probabilities.
    ``apply(query, key, value, mask, is_causal, scale, enable_gqa)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        output: Tensor = _attention(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        ctx.arguments = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        ctx.dtype, ctx.shapes = query.dtype, [tuple(tensor.shape) for tensor in (query, key, value)]
        saved: list[Tensor | None] = [mask]
        for tensor in (query, key, value):
            copy = torch.empty(
                tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device
            )
            saved += quantize(copy.copy_(tensor), BITS)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        tensors = []
        for index, shape in enumerate(ctx.shapes):
            stride = torch.empty(shape, device="meta").stride()
            quantized = Quantized(*saved[3 * index : 3 * index + 3])
            tensor = dequantize(quantized, BITS, shape, stride, ctx.dtype)
            tensors.append(tensor.requires_grad_(ctx.needs_input_grad[index]))
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            output = _attention(*tensors, mask, 0.0, **ctx.arguments)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad))
        grads = [next(found) if tensor.requires_grad else None for tensor in tensors]
        return (*grads, None, None, None, None)


def rounded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` that keeps 8 bits per element of its inputs.

    Arguments and result as there. The stock operator runs with dropout, a mask that needs a gradient, without a
    gradient and under a compiler.
    """
    tensors = (query, key, value)
    if (
        dropout_p > 0
        or (attn_mask is not None and attn_mask.requires_grad)
        or torch.compiler.is_compiling()
        or not any(tracked(tensor) for tensor in tensors)
        or len({tensor.dtype for tensor in tensors}) > 1
        or query.numel() * key.numel() * value.numel() == 0
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    result: Tensor = RoundedAttention.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return result


def _with_names(function: Any, **names: Any) -> Any:
    """A function of the same code that finds other objects under some of its global names."""
    clone = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


# The body of nn.MultiheadAttention as installed, with our operator for the stock one.
rounded_multi_head_attention = _with_names(
    F.multi_head_attention_forward, scaled_dot_product_attention=rounded_attention
)
