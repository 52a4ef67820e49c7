"""A batch norm whose backward pass reads the few bits that are kept of its input, and makes no tensor of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.saving import lent


class BatchNorm(torch.autograd.Function):
    """The stock operator; its backward pass takes what is lent in the place of the input, where it can.

    Args:
        input: ``(B, C, ...)``.
        weight: ``(C,)``, or ``None``.
        bias: ``(C,)``, or ``None``.
        running_mean: ``(C,)``, or ``None``.
        running_var: ``(C,)``, or ``None``.
        training: whether the statistics are those of the input.
        momentum: of the running statistics.
        eps: added to the variance.
        statistics: an empty list; gets mean and one over the deviation, ``(C,)`` each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        statistics: list[Tensor],
    ) -> Tensor:
        result, mean, spread = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if training:
            statistics[:] = mean, spread
        else:  # copies, since these two may be another step's in the backward pass
            assert running_mean is not None
            assert running_var is not None
            mean, spread = running_mean.clone(), running_var.clone()
            statistics[:] = mean.float(), (spread.float() + eps).rsqrt()
        ctx.save_for_backward(input, weight, mean, spread)
        ctx.training, ctx.eps = training, eps
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[:3]
        kept, (input, weight, mean, spread) = lent(ctx, "backward")
        found = None
        if kept is not None:
            invstd = spread if ctx.training else (spread.float() + ctx.eps).rsqrt()
            found = kept.backward(grad, weight, mean, invstd, not ctx.training, needed[0])
            if found is None:
                input = kept.restore()
        if found is None:
            running = (None, None) if ctx.training else (mean, spread)
            found = torch.ops.aten.native_batch_norm_backward(
                grad, input, weight, *running, mean, spread, ctx.training, ctx.eps, needed
            )
        return *(tensor if asked else None for tensor, asked in zip(found, needed, strict=True)), *(None,) * 6
