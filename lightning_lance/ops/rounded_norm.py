"""Normalisation layers that keep their normalised input in 4 bits.

Output and running statistics are those of the stock kernel. The backward pass is the stock kernel too, on the rounded
normalised input with mean 0 and deviation 1; in the input gradient ``(g - mean(g) - x̂ mean(g x̂)) / σ`` the rounding
touches the last term only, which is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops.backward import first_order_only
from lightning_lance.tensors.rounding import Quantized, dequantize, quantize

BITS = 4
_aten: Any = torch.ops.aten


def _save(ctx: Any, normalised: Tensor, *others: Tensor | None) -> None:
    ctx.stride = normalised.stride()
    ctx.save_for_backward(*quantize(normalised, BITS), *others)


def _load(ctx: Any, grad: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    codes, low, step, *others = ctx.saved_tensors
    return dequantize(Quantized(codes, low, step), BITS, grad.shape, ctx.stride, grad.dtype), tuple(others)


def _wide(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


class RoundedBatchNorm(torch.autograd.Function):
    """Batch normalisation by batch statistics, or by fixed ones with a weight that trains.

    Saved: 4 bits and 1/16 byte per element. ``apply(input, weight, bias, mean, var, training, momentum, eps)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output, batch_mean, batch_deviation, *_ = torch._batch_norm_impl_index(
            input, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        if not training:
            assert mean is not None
            assert var is not None
            batch_mean, batch_deviation = mean, (var + eps).rsqrt_()
        shape = [1, -1] + [1] * (input.dim() - 2)
        normalised = (input - batch_mean.view(shape)).mul_(batch_deviation.view(shape))
        scale = batch_deviation if weight is None else weight * batch_deviation
        ctx.training = training
        _save(ctx, normalised.to(_wide(normalised)), scale)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, (scale,) = _load(ctx, grad)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        statistics = (None, None, zero, one, True) if ctx.training else (zero, one, None, None, False)
        grads = _aten.native_batch_norm_backward(
            grad, normalised, scale, *statistics, 0.0, [bool(need) for need in ctx.needs_input_grad[:3]]
        )
        return (*grads, None, None, None, None, None)


class RoundedLayerNorm(torch.autograd.Function):
    """Layer normalisation. Saved: 4 bits and 1/16 byte per element. ``apply(input, shape, weight, bias, eps)``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        output, mean, deviation = torch.native_layer_norm(input, shape, weight, bias, eps)
        normalised = (input - mean).mul_(deviation)
        ctx.normalised_shape = shape
        _save(ctx, normalised.to(_wide(normalised)), weight, bias, deviation)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, (weight, bias, deviation) = _load(ctx, grad)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        zero, one = torch.zeros_like(deviation), torch.ones_like(deviation)
        grad_input, grad_weight, grad_bias = _aten.native_layer_norm_backward(
            grad, normalised, list(ctx.normalised_shape), zero, one, weight, bias, wanted
        )
        if grad_input is not None:
            grad_input = grad_input.mul_(deviation)
        return grad_input, None, grad_weight, grad_bias, None


class RoundedGroupNorm(torch.autograd.Function):
    """Group normalisation. Saved: 4 bits and 1/16 byte per element. ``apply(input, groups, weight, bias, eps)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        size, channels = input.shape[:2]
        positions = input.numel() // max(size * channels, 1)
        ctx.sizes = (size, channels, positions, groups)
        last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if last else torch.contiguous_format
        output, mean, deviation = torch.native_group_norm(
            input.contiguous(memory_format=ctx.format), weight, bias, size, channels, positions, groups, eps
        )
        grouped = input.reshape(size, groups, -1).contiguous()  # as the gradient will be: kernels up to 2.6 do not look
        normalised = (grouped - mean.unsqueeze(-1)).mul_(deviation.unsqueeze(-1)).view(input.shape)
        _save(ctx, normalised.to(_wide(normalised)), weight, deviation)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, (weight, deviation) = _load(ctx, grad)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        zero, one = torch.zeros_like(deviation), torch.ones_like(deviation)
        grad_input, grad_weight, grad_bias = _aten.native_group_norm_backward(
            grad.contiguous(), normalised, zero, one, weight, *ctx.sizes, wanted
        )
        if grad_input is not None:
            size, _, _, groups = ctx.sizes
            grad_input = grad_input.view(size, groups, -1).mul_(deviation.unsqueeze(-1)).view(grad.shape)
            grad_input = grad_input.contiguous(memory_format=ctx.format)
        return grad_input, None, grad_weight, grad_bias, None


def rounded_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` that keeps its normalised input in 4 bits.

    Args:
        input: ``(B, C, ...)``, with more than one value per channel where ``training``.
        weight: ``(C,)`` or ``None``.
        bias: ``(C,)`` or ``None``.
        mean: running mean ``(C,)``, updated where ``training``; may then be ``None``.
        var: running variance ``(C,)``, likewise.
        training: whether batch statistics normalise.
        momentum: of the running statistics.
        eps: added to the variance.

    Returns:
        Same shape and dtype as the input, bit for bit the stock output.
    """
    result: Tensor = RoundedBatchNorm.apply(input, weight, bias, mean, var, training, momentum, eps)
    return result


def rounded_layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm` that keeps its normalised input in 4 bits; arguments as there."""
    result: Tensor = RoundedLayerNorm.apply(input, normalized_shape, weight, bias, eps)
    return result


def groupable(input: Tensor, num_groups: int) -> bool:
    """Whether :func:`rounded_group_norm` takes this input; the stock function has the messages for the rest."""
    return input.dim() > 1 and input.shape[1] % num_groups == 0 and input.numel() > 0


def rounded_group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """:func:`torch.nn.functional.group_norm` that keeps its normalised input in 4 bits; arguments as there."""
    result: Tensor = RoundedGroupNorm.apply(input, num_groups, weight, bias, eps)
    return result
