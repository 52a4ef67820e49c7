"""Linear maps and convolutions that multiply gradients with a rounded input in half precision, for their weight.

What is kept of the input has four significant bits, and a bfloat16 eight: the product in it is a tenth of a percent of
the weight's gradient away, where rounding alone is some percent. Processors with instructions for it take it in half
the time or less. Results and gradients of inputs are those of the stock operators, in the precision of the model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.conv import Geometry, conv_input_grad, convolve
from lightning_lance.ops.linear import owned
from lightning_lance.ops.saving import lent
from lightning_lance.tensors import native


@cache
def has_half_products() -> bool:
    """Whether the processor multiplies matrices of bfloat16 faster than those of float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported()) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _halved(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """The input in half precision, where it was rounded, else as it is, and the weight."""
    kept, (input, weight) = lent(ctx, "halved")
    if kept is None:
        return None, input, weight
    half = kept.halved() if native.takes(grad) else None
    return half, kept.restore() if half is None else input, weight


class Linear(torch.autograd.Function):
    """``apply(input, weight, bias)``, as :func:`torch.nn.functional.linear` of at least two axes."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return owned(F.linear(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        half, input, weight = _halved(ctx, grad)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        found = None
        if needs_weight and half is not None:
            found = (rows.bfloat16().T @ half.reshape(-1, half.shape[-1])).to(weight.dtype)
        elif needs_weight:
            found = rows.T @ input.reshape(-1, input.shape[-1])
        return grad @ weight if needs_input else None, found, rows.sum(0) if needs_bias else None


class Conv(torch.autograd.Function):
    """``apply(input, weight, bias, geometry)``, a convolution of one to three axes with a batch."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.shape = geometry, tuple(input.shape)
        return convolve(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        half, input, weight = _halved(ctx, grad)
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if half is None:
            return *_stock(grad, input, weight, ctx.geometry, [needs_input, needs_weight, needs_bias]), None
        found = None
        if needs_weight:
            gradient, like = grad.bfloat16(), torch.empty_like(weight, dtype=torch.bfloat16)
            _, found, _ = _stock(gradient, half, like, ctx.geometry, [False, True, False])
            found = found.to(weight.dtype)
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        return (
            conv_input_grad(grad, weight, ctx.geometry, ctx.shape) if needs_input else None,
            found,
            grad.sum(axes) if needs_bias else None,
            None,
        )


def _stock(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]) -> Any:
    _, stride, padding, dilation, groups, *_ = geometry
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [weight.shape[0]], stride, padding, dilation, False, zeros, groups, mask
    )
