"""Activations whose derivative takes two values: one bit per element instead of the input or output.

The forward pass is the stock kernel and so is the backward pass, on a stand-in value for each side of the flag: the
gradient is bit for bit the stock one. (For a NaN input the gradient of the stock hardtanh depends on the place of
the element in memory; ours lets it pass.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops import inplace as in_place
from lightning_lance.ops.backward import first_order_only
from lightning_lance.tensors.bits import flagged_gradient, pack_bits
from lightning_lance.tensors.tracing import eager_cpu

_aten: Any = torch.ops.aten
_CHUNK = 1 << 18  # elements; a multiple of 8


def _save(ctx: Any, flags: Tensor) -> None:
    ctx.stride = flags.stride()
    ctx.save_for_backward(pack_bits(flags))


def _returned(ctx: Any, input: Tensor, output: Tensor, inplace: bool) -> Tensor:
    if inplace:
        ctx.mark_dirty(input)
        return input
    return output


def _outside(input: Tensor, low: float, high: float) -> Tensor:
    """Flags of ``x <= low or x >= high``; a NaN is inside."""
    if input.dtype.itemsize == 2 and not (_short(low) and _short(high)):
        input = input.float()  # as the stock kernel does; comparing in half precision would round the threshold
    return input.le(low).logical_or_(input.ge(high))


def _truth_tests(input: Tensor, low: float, high: float) -> bool:
    """Whether :func:`_clamped_bits` is exact on what the input becomes, and faster."""
    dense = input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    return eager_cpu(input) and dense and math.isfinite(low) and math.isfinite(high)


def _clamped_bits(output: Tensor, low: float, high: float) -> Tensor:
    """Packed :func:`_outside`, from the clamped output.

    A comparison on the CPU takes several times as long as a truth test, and the difference of two numbers is zero where
    they are equal only. So is the product of the differences to both ends, if these are 1 or more apart: none is too
    small for a number then. In pieces, so that neither the differences nor the flags are ever there as a whole.
    """
    bits = []
    flat: Any = output.as_strided((output.numel(),), (1,))
    for part in flat.split(_CHUNK):
        above = part - low if low else part
        if high - low >= 1.0:
            inside = (part - high).mul_(above).bool()
        else:
            inside = above.bool().logical_and_((part - high if high else part).bool())
        bits.append(pack_bits(inside))
    return (torch.cat(bits) if len(bits) > 1 else bits[0]).bitwise_not_()


def _short(value: float) -> bool:
    """Whether float16 and bfloat16 both hold the number: eight significant bits, a moderate exponent."""
    mantissa, exponent = math.frexp(value)
    return (mantissa * 256).is_integer() and abs(exponent) < 14


class ReLU(torch.autograd.Function):
    """``max(x, 0)``. Saved: 1 bit per element. ``apply(input, inplace)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool) -> Tensor:
        output = torch.relu_(input) if inplace else torch.relu(input)
        _save(ctx, output.bool())  # positive or NaN, several times as fast as a comparison
        return _returned(ctx, input, output, inplace)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return flagged_gradient(_aten.threshold_backward, grad, bits, ctx.stride, 0, 1, 0), None


class Hardtanh(torch.autograd.Function):
    """``min(max(x, low), high)``, with 0 and 6 also ReLU6. Saved: 1 bit per element.

    ``apply(input, inplace, low, high)``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool, low: float, high: float) -> Tensor:
        flags = None if _truth_tests(input, low, high) else _outside(input, low, high)
        output = F.hardtanh(input, low, high, inplace)
        if flags is None:
            ctx.stride = output.stride()
            ctx.save_for_backward(_clamped_bits(output, low, high))
        else:
            _save(ctx, flags)
        return _returned(ctx, input, output, inplace)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return flagged_gradient(_aten.hardtanh_backward, grad, bits, ctx.stride, 0, 1, -1, 1), None, None, None


class LeakyReLU(torch.autograd.Function):
    """``max(x, 0) + slope min(x, 0)``. Saved: 1 bit per element. ``apply(input, inplace, slope)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool, slope: float) -> Tensor:
        ctx.slope = slope
        _save(ctx, input > 0)
        return _returned(ctx, input, F.leaky_relu(input, slope, inplace), inplace)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        kernel = _aten.leaky_relu_backward
        return flagged_gradient(kernel, grad, bits, ctx.stride, -1, 1, ctx.slope, False), None, None


class Hardsigmoid(torch.autograd.Function):
    """``min(max(x + 3, 0), 6) / 6``. Saved: 1 bit per element. ``apply(input, inplace)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool) -> Tensor:
        _save(ctx, input.gt(-3).logical_and_(input.lt(3)))
        return _returned(ctx, input, F.hardsigmoid(input, inplace), inplace)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return flagged_gradient(_aten.hardsigmoid_backward, grad, bits, ctx.stride, 4, 0), None


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.relu` that keeps 1 bit per element.

    Args:
        input: any shape, floating point.
        inplace: overwrite the input.

    Returns:
        Same shape and dtype.
    """
    return in_place.apply(ReLU, input, inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.hardtanh` that keeps 1 bit per element; arguments as there.

    Raises:
        ValueError: ``min_val`` exceeds ``max_val``.
    """
    return in_place.apply(Hardtanh, input, inplace, min_val, max_val)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.relu6` that keeps 1 bit per element; arguments as there."""
    return hardtanh(input, 0.0, 6.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.leaky_relu` that keeps 1 bit per element; arguments as there.

    A negative slope in place, whose stock backward is an error, goes to the stock operator.
    """
    if inplace and negative_slope < 0:
        return F.leaky_relu(input, negative_slope, inplace)
    return in_place.apply(LeakyReLU, input, inplace, negative_slope)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.hardsigmoid` that keeps 1 bit per element; arguments as there."""
    return in_place.apply(Hardsigmoid, input, inplace)
