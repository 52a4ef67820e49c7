"""Smooth activations that keep their derivative in 4 bits instead of their input or output.

The forward pass is the stock kernel. The derivative is taken there, by the stock backward kernel, and rounded to one
of 16 evenly spaced values, 0 and 1 among them where the activation saturates (compare Novikov et al., "Few-bit
backward", 2022, who fit a piecewise constant function of the input instead; for equal bits even levels of the
derivative measured better: cosine .9995 against .9994 for GELU, .9978 against .9984 for Hardswish).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops import inplace as in_place
from lightning_lance.ops.backward import first_order_only
from lightning_lance.tensors.bits import product_into
from lightning_lance.tensors.cached import constant
from lightning_lance.tensors.codes import pack_codes, unpack_codes, unpacking_table

_aten: Any = torch.ops.aten


class Smooth(NamedTuple):
    """An elementwise function and how its derivative is rounded.

    Attributes:
        forward: the stock function ``(input, **arguments)``.
        backward: its stock backward kernel ``(grad, input or output, **arguments)``.
        of_output: whether that kernel reads the output.
        below: levels below 0.
        resolution: levels from 0 to 1. The derivative lies between ``-(below + .5)`` and ``15.5 - below`` of them.
    """

    forward: Callable[..., Tensor]
    backward: Any
    of_output: bool
    below: int
    resolution: int


GELU = Smooth(F.gelu, _aten.gelu_backward, False, 2, 11)
SILU = Smooth(F.silu, _aten.silu_backward, False, 2, 11)
MISH = Smooth(F.mish, _aten.mish_backward, False, 2, 11)
HARDSWISH = Smooth(F.hardswish, _aten.hardswish_backward, False, 4, 7)
SIGMOID = Smooth(torch.sigmoid, _aten.sigmoid_backward, True, 0, 60)
TANH = Smooth(torch.tanh, _aten.tanh_backward, True, 0, 15)


class FewBitActivation(torch.autograd.Function):
    """Any :class:`Smooth`. Saved: 4 bits per element. ``apply(input, inplace, smooth, arguments)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool, smooth: Smooth, arguments: dict[str, Any]) -> Tensor:
        one = input.new_ones(()).expand(input.shape)
        if smooth.of_output:
            output = smooth.forward(input)
            derivative = smooth.backward(one, output)
        else:
            derivative = smooth.backward(one, input, **arguments)
            output = smooth.forward(input, **arguments, **({"inplace": True} if inplace else {}))
        levels = derivative.mul_(smooth.resolution).add_(smooth.below + 0.5).clamp_(0, 15.5)
        levels = levels.to(torch.int8).view(torch.uint8)  # the direct way to uint8 is slow on the CPU
        ctx.smooth, ctx.stride = smooth, levels.stride()
        ctx.save_for_backward(pack_codes(levels.as_strided((levels.numel(),), (1,)), 2))
        if inplace:
            ctx.mark_dirty(input)
            return input
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        derivative = unpack_codes(packed, _derivatives(ctx.smooth, grad.dtype, grad.device))
        derivative = derivative.as_strided(grad.shape, ctx.stride)
        return product_into(derivative, grad), None, None, None


@constant
def _derivatives(smooth: Smooth, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two derivatives for every byte of levels."""
    levels = torch.arange(16, dtype=torch.float32, device=device)
    return unpacking_table(levels.sub_(smooth.below).div_(smooth.resolution).to(dtype), 2)


def few_bit(smooth: Smooth, input: Tensor, inplace: bool = False, **arguments: Any) -> Tensor:
    """A smooth activation whose gradient is that of the stock one with a rounded derivative.

    Args:
        smooth: which one.
        input: any shape, floating point.
        inplace: overwrite the input; only for activations whose stock function can.
        arguments: further arguments of the stock function, such as ``approximate`` of GELU.

    Returns:
        Same shape and dtype, bit for bit the stock output.
    """
    return in_place.apply(FewBitActivation, input, inplace, smooth, arguments)
