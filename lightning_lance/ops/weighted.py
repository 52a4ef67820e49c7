"""Linear maps and convolutions that multiply gradients with a rounded input in half precision, for their weight.

What is kept of the input has four significant bits, and a bfloat16 eight: the product in it is some tenths of a percent
of the weight's gradient away, where rounding alone is some percent. Processors with instructions for it take it in half
the time or less. Results and gradients of inputs are those of the stock operators, in the precision of the model.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import outside_autocast
from lightning_lance.ops.conv import Geometry, conv_input_grad, convolve
from lightning_lance.ops.linear import owned
from lightning_lance.ops.saving import lent
from lightning_lance.tensors import native


def has_half_products() -> bool:
    """Whether the processor multiplies matrices of bfloat16 faster than those of float32."""
    return _supported() and bool(torch._C._get_mkldnn_enabled())


@cache
def _supported() -> bool:
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
        del half, input  # before there is another tensor of their size
        return grad @ weight if needs_input else None, found, rows.sum(0) if needs_bias else None


def is_usual(geometry: Geometry, sizes: tuple[int, ...]) -> bool:
    """Whether a convolution is one of those that the library's kernels in half precision are made for.

    Of others, such as those of three axes, with dilation, or with padding as wide as the kernel, those of oneDNN 3
    return numbers that have nothing to do with the gradient, or write beside their memory.
    """
    kernel, stride, padding, dilation, groups, pad, _ = geometry
    axes = zip(sizes, kernel, stride, padding, strict=True)
    return (
        len(sizes) < 3
        and groups == 1
        and not pad
        and set(dilation) == {1}
        and all(size >= k >= s and 2 * p < k for size, k, s, p in axes)
    )


_SOUND: dict[Any, bool] = {}
"""Shapes, strides and geometries of convolutions that were compared with those in full precision."""


def _is_sound(key: Any, found: Tensor, expected: Tensor) -> bool:
    """Whether a gradient is near to the one in full precision; noted where that says something."""
    difference, size = float(torch.dist(found, expected)), float(expected.norm())
    sound = difference <= 0.02 * size
    if 0 < size < math.inf:
        if len(_SOUND) >= 1 << 12:
            _SOUND.clear()
        _SOUND[key] = sound
    return sound or not math.isfinite(size)


class Conv(torch.autograd.Function):
    """``apply(input, weight, bias, geometry)``, a convolution with a batch that :func:`is_usual`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.shape = geometry, tuple(input.shape)
        return convolve(input, weight, bias, geometry)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        half, input, weight = _halved(ctx, grad)
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if half is None:
            return *_stock(grad, input, weight, ctx.geometry, [needs_input, needs_weight, needs_bias]), None
        found = None
        if needs_weight:
            found = _weight_grad(grad, half, weight, ctx.geometry)
        del half  # before there is another tensor of its size
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        return (
            conv_input_grad(grad, weight, ctx.geometry, ctx.shape) if needs_input else None,
            found,
            grad.sum(axes) if needs_bias else None,
            None,
        )


def _weight_grad(grad: Tensor, half: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    key = grad.shape, grad.stride(), half.shape, half.stride(), geometry
    alone = [False, True, False]
    found: Tensor | None = None
    if _SOUND.get(key, True):
        like = torch.empty_like(weight, dtype=torch.bfloat16)
        found = _stock(grad.bfloat16(), half, like, geometry, alone)[1].to(weight.dtype)
    if found is None or key not in _SOUND:
        full: Tensor = _stock(grad, half.to(grad.dtype), weight, geometry, alone)[1]
        if found is None or not _is_sound(key, found, full):
            return full
    return found


def _stock(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]) -> Any:
    _, stride, padding, dilation, groups, *_ = geometry
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [weight.shape[0]], stride, padding, dilation, False, zeros, groups, mask
    )
