"""Dropout that keeps one bit per element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lance.ops import inplace as in_place
from lightning_lance.ops.backward import first_order_only
from lightning_lance.tensors.bits import expand_bits, pack_bits, product_into

_FUSED = ("cuda", "xpu")


class Dropout(torch.autograd.Function):
    """Bernoulli mask times ``1 / (1 - p)``, from the same random draws as the stock operator.

    Saved: 1 bit per element. ``apply(input, inplace, p)``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool, p: float) -> Tensor:
        ctx.p = p
        # What the stock operator runs; compiled code has random numbers of its own.
        ctx.fused = torch.compiler.is_compiling() or (input.device.type in _FUSED and not inplace)
        if ctx.fused:
            output, kept = torch.native_dropout(input, p, True)
        else:
            noise = torch.empty_like(input).bernoulli_(1 - p)
            kept = noise.bool()  # a cast, several times as fast as a comparison
            noise.div_(1 - p)
            output = input.mul_(noise) if inplace else input * noise
        ctx.stride = kept.stride()
        ctx.save_for_backward(pack_bits(kept))
        if inplace:
            ctx.mark_dirty(input)
            return input
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        if ctx.fused:
            kept = expand_bits(bits, grad.shape, ctx.stride, 0, 1, torch.bool)
            return torch.ops.aten.native_dropout_backward(grad, kept, 1 / (1 - ctx.p)), None, None
        # The stock operator multiplies by the mask in the dtype of the input, with 1 / (1 - p) rounded to it.
        scale = float(torch.ones((), dtype=grad.dtype).div_(1 - ctx.p))
        noise = expand_bits(bits, grad.shape, ctx.stride, 0, 1, grad.dtype).mul_(scale)
        return product_into(noise, grad), None, None


def replaceable(input: Tensor, p: float) -> bool:
    """Whether :func:`dropout` can take the stock operator's place on this input, its random draws included."""
    return 0 < p < 1 and input.numel() > 0 and input.device.type in ("cpu", *_FUSED)


def dropout(input: Tensor, p: float = 0.5, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.dropout` in training mode that keeps 1 bit per element.

    Draws from the generator of the input's device exactly what the stock operator draws.

    Args:
        input: any shape, floating point.
        p: probability of 0 for an element, in the open interval (0, 1); at its ends the stock operator keeps
            nothing that is worth replacing.
        inplace: overwrite the input.

    Returns:
        Same shape and dtype.
    """
    return in_place.apply(Dropout, input, inplace, p)
