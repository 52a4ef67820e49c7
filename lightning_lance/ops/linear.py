"""``y = x Wᵀ + b`` that keeps the core of ``x`` for the weight gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import first_order_only, outside_autocast
from lightning_lance.ops.factors import Factors, project_gradient
from lightning_lance.tensors.linalg import mode_products


def linear_weight_grad(grad: Tensor, core: Tensor, factors: Factors) -> Tensor:
    """Weight gradient from the core; the input is never rebuilt.

    The gradient is projected on the batch and token modes instead, so that the only product with the
    feature width is ``(O, r_0 r_1 …) × (r_0 r_1 …, r_K)``.

    Args:
        grad: ``(B, *tokens, O)``.
        core: ``(r_0, *r_tokens, r_K)``.
        factors: projections that made the core.

    Returns:
        ``(O, K)``.
    """
    grad, core = project_gradient(grad, core.to(grad.dtype), factors)
    grad = mode_products(grad, [None if factor is None else factor.to(grad.dtype).T for factor in factors.spatial], 1)
    weight_grad = grad.reshape(-1, grad.shape[-1]).T @ core.reshape(-1, core.shape[-1])
    if factors.channel is not None:
        weight_grad = weight_grad @ factors.channel.to(grad.dtype).T
    return weight_grad


class LowRankLinear(torch.autograd.Function):
    """Linear map with exact output, input gradient and bias gradient, and a projected weight gradient.

    Saved: core, factors, and the weight where the input needs a gradient.
    ``apply(input, weight, bias, core, rotation, groups, scale, channel, *spatial)`` with the fields of
    :class:`~lightning_lance.ops.factors.Factors`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        rotation: Tensor | None,
        groups: Tensor | None,
        scale: float,
        channel: Tensor | None,
        *spatial: Tensor | None,
    ) -> Tensor:
        ctx.scale = scale
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(core, kept, rotation, groups, channel, *spatial)
        return owned(F.linear(input, weight, bias))

    @staticmethod
    @first_order_only
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        core, weight, rotation, groups, channel, *spatial = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            factors = Factors(rotation, groups, ctx.scale, channel, tuple(spatial))
            grad_weight = linear_weight_grad(grad, core, factors)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return (grad_input, grad_weight, grad_bias, *[None] * (5 + len(spatial)))


def owned(output: Tensor) -> Tensor:
    """An output that is no view, so that operators may write on it: a linear map of tokens returns a view of rows."""
    if torch.compiler.is_compiling() or not output._is_view():
        return output
    return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]
