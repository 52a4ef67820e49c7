"""Convolutions that keep the core of their input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import first_order_only, outside_autocast
from lightning_lance.ops.factors import Factors, eager_cpu, project_gradient
from lightning_lance.tensors.linalg import mode_product, mode_products

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """Static arguments of a convolution with ``len(kernel)`` spatial axes.

    Attributes:
        kernel: kernel sizes.
        stride: strides.
        padding: symmetric zero padding of the convolution proper.
        dilation: dilations.
        groups: channel groups.
        pad: padding done before it, as :func:`torch.nn.functional.pad` takes it; empty for none.
        pad_mode: mode of ``pad``: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"

    def padded(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial sizes after ``pad``."""
        if not self.pad:
            return sizes
        pairs = list(zip(self.pad[::2], self.pad[1::2], strict=True))[::-1]
        return tuple(size + sum(pair) for size, pair in zip(sizes, pairs, strict=True))

    def is_pointwise(self) -> bool:
        """Whether every output position reads one input position."""
        return math.prod(self.kernel) == 1 and not any(self.padding) and not self.pad and self.groups == 1


def geometry(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> Geometry:
    """Geometry of a :class:`torch.nn.Conv2d` (or 1d, 3d) from its attributes.

    ``"same"`` padding that is longer at the end, and every mode but zeros, becomes an explicit ``pad``.
    """
    if padding == "valid":
        padding = (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        assert not isinstance(padding, str)
        before = after = list(padding)
    if padding_mode == "zeros" and before == after:
        return Geometry(kernel, stride, tuple(before), dilation, groups)
    pad = tuple(n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return Geometry(kernel, stride, (0,) * len(kernel), dilation, groups, pad, mode)


def pad_input(tensor: Tensor, geometry: Geometry) -> Tensor:
    """The padding that is done before the convolution proper; a no-op where there is none."""
    return F.pad(tensor, geometry.pad, geometry.pad_mode) if geometry.pad else tensor


def pad_adjoint(grad: Tensor, geometry: Geometry, sizes: tuple[int, ...]) -> Tensor:
    """Adjoint of :func:`pad_input`: what was padded goes back to the positions that it was copied from.

    Args:
        grad: ``(B, C, *padded)``.
        geometry: static arguments.
        sizes: spatial sizes before padding.

    Returns:
        ``(B, C, *sizes)``.
    """
    if geometry.pad_mode == "constant":
        return F.pad(grad, [-n for n in geometry.pad])
    for axis, size in enumerate(sizes):
        before, after = geometry.pad[::2][-1 - axis], geometry.pad[1::2][-1 - axis]
        if not before and not after:
            continue
        position = torch.arange(-before, size + after, device=grad.device)
        if geometry.pad_mode == "circular":
            source = position.remainder(size)
        elif geometry.pad_mode == "replicate":
            source = position.clamp(0, size - 1)
        else:
            source = (size - 1) - ((size - 1) - position.abs()).abs()
        inner = grad.narrow(2 + axis, before, size).clone()
        for start, length in ((0, before), (before + size, after)):
            inner.index_add_(2 + axis, source[start : start + length], grad.narrow(2 + axis, start, length))
        grad = inner
    return grad


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The stock convolution of a geometry, differentiable."""
    conv: Any = _CONV[len(geometry.kernel)]
    result: Tensor = conv(
        pad_input(input, geometry), weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    return result


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    zeros = [0] * len(geometry.kernel)
    result = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        False,
        zeros,
        geometry.groups,
        [*mask, False],
    )
    return result[0], result[1]


_MANY_POSITIONS = 64
"""From so many positions on, the input gradient of a pointwise convolution is faster as a product for each sample."""
_PRODUCTS = 0.25
"""How large the products of all samples, whose sum is a weight gradient, may be next to copies of both factors."""


def _by_sample(grad: Tensor) -> bool:
    """Whether matrix products for each sample, which read and write the tensors as they are, are worth a thought."""
    return eager_cpu(grad) and grad.is_contiguous()


def conv_input_grad(grad: Tensor, weight: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
    """Exact input gradient; of the input only the shape is needed.

    Args:
        grad: ``(B, O, *out)``.
        weight: ``(O, C / groups, *kernel)``.
        geometry: static arguments.
        shape: ``(B, C, *sizes)`` of the input.

    Returns:
        ``(B, C, *sizes)``.
    """
    many = math.prod(grad.shape[2:]) >= _MANY_POSITIONS
    if many and geometry.is_pointwise() and set(geometry.stride) == {1} and _by_sample(grad):
        matrix = weight.to(grad.dtype).reshape(weight.shape[:2]).mT
        return torch.bmm(matrix.expand(grad.shape[0], -1, -1), grad.flatten(2)).view(shape)
    # As a transposed convolution, since convolution_backward makes a full copy of any input on the CPU, even of one
    # that it reads for its shape only. The operator is not one that autocast casts.
    sizes = geometry.padded(shape[2:])
    reached = [
        (out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        for out, stride, padding, dilation, kernel in zip(
            grad.shape[2:], geometry.stride, geometry.padding, geometry.dilation, geometry.kernel, strict=True
        )
    ]
    grad_padded: Tensor = torch.ops.aten.convolution(
        grad,
        weight.to(grad.dtype),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        True,
        [size - end for size, end in zip(sizes, reached, strict=True)],
        geometry.groups,
    )
    if not geometry.pad:
        return grad_padded
    return pad_adjoint(grad_padded, geometry, shape[2:])


def conv_weight_grad(
    grad: Tensor, core: Tensor, weight_shape: torch.Size, geometry: Geometry, factors: Factors
) -> Tensor:
    """Weight gradient from the core, with ``r_0`` samples in place of ``B``; the input is never rebuilt.

    Args:
        grad: ``(B, O, *out)``.
        core: ``(r_0, r_1, *r_spatial)``.
        weight_shape: ``(O, C / groups, *kernel)``.
        geometry: static arguments.
        factors: projections that made the core.

    Returns:
        ``(O, C / groups, *kernel)``.
    """
    grad, core = project_gradient(grad, core.to(grad.dtype), factors)
    channel = None if factors.channel is None else factors.channel.to(grad.dtype)
    if geometry.is_pointwise():
        weight_grad = _pointwise_weight_grad(grad, core, geometry, factors)
    else:
        spatial = [None if factor is None else factor.to(grad.dtype) for factor in factors.spatial]
        core = mode_products(core, spatial, 2)
        if channel is not None and geometry.groups > 1:
            core, channel = mode_product(core, channel, 1), None
        core = pad_input(core, geometry)
        shape = (weight_shape[0], core.shape[1] // geometry.groups, *geometry.kernel)
        _, weight_grad = _backward(grad, core, grad.new_empty(1).expand(shape), geometry, (False, True))
    return weight_grad if channel is None else mode_product(weight_grad, channel, 1)


def _pointwise_weight_grad(grad: Tensor, core: Tensor, geometry: Geometry, factors: Factors) -> Tensor:
    """A 1x1 kernel needs no rebuilt spatial mode: the gradient is projected on it instead."""
    spatial: list[Tensor | None] = [None] * len(factors.spatial)
    for axis, (factor, step) in enumerate(zip(factors.spatial, geometry.stride, strict=True)):
        if factor is not None:
            spatial[axis] = factor[::step].to(grad.dtype).T
        elif step > 1:
            core = core[(slice(None),) * (axis + 2) + (slice(None, None, step),)]
    grad = mode_products(grad, spatial, 2)
    out, width, positions = grad.shape[1], core.shape[1], math.prod(grad.shape[2:])
    if out * width <= _PRODUCTS * (out + width) * positions and _by_sample(grad) and core.is_contiguous():
        products = torch.bmm(grad.flatten(2), core.flatten(2).mT)
        return products.sum(0).view(out, width, *geometry.kernel)
    rows = grad.transpose(0, 1).reshape(out, -1)
    columns = core.transpose(0, 1).reshape(width, -1)
    return (rows @ columns.T).reshape(out, width, *geometry.kernel)


class LowRankConv(torch.autograd.Function):
    """Convolution with exact output, input gradient and bias gradient, and a projected weight gradient.

    Saved: core, factors, and the weight where the input needs a gradient.
    ``apply(input, weight, bias, geometry, core, rotation, groups, scale, channel, *spatial)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        core: Tensor,
        rotation: Tensor | None,
        groups: Tensor | None,
        scale: float,
        channel: Tensor | None,
        *spatial: Tensor | None,
    ) -> Tensor:
        ctx.geometry, ctx.scale, ctx.shape = geometry, scale, tuple(input.shape)
        ctx.weight_shape = weight.shape
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(core, kept, rotation, groups, channel, *spatial)
        return convolve(input, weight, bias, geometry)

    @staticmethod
    @first_order_only
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        core, weight, rotation, groups, channel, *spatial = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = conv_input_grad(grad, weight, ctx.geometry, ctx.shape)
        if ctx.needs_input_grad[1]:
            factors = Factors(rotation, groups, ctx.scale, channel, tuple(spatial))
            grad_weight = conv_weight_grad(grad, core, ctx.weight_shape, ctx.geometry, factors)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
        return (grad_input, grad_weight, grad_bias, *[None] * (6 + len(spatial)))
