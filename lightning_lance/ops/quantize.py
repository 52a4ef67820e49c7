"""Tensors kept in 4 or 8 bits per element, with a range of their own for every group of neighbours in memory.

Uniform levels between the smallest and the largest of 64 elements, as in ActNN (Chen et al., ICML 2021, section 3)
and GACT (Liu et al., ICML 2022), but rounded to the nearest level: no random numbers are drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.precision import GROUP

_LOW_HALVES = 0x0F0F0F0F0F0F0F0F


class Quantized(NamedTuple):
    """A quantised tensor of ``n`` elements.

    Attributes:
        codes: uint8; of 4 bits each, a byte holds one of the first and one of the second half of the tensor.
        low: ``(ceil(n / 64), 1)``, the value of code 0 in each group.
        step: same shape, from one level to the next.
    """

    codes: Tensor
    low: Tensor
    step: Tensor


def quantize(values: Tensor, bits: int, range_dtype: torch.dtype = torch.float16) -> Quantized:
    """Quantise a tensor in memory order.

    Args:
        values: float32 or float64, without gaps or overlaps in memory. Overwritten.
        bits: 4 or 8.
        range_dtype: dtype of the ranges; float16 takes 1/16 byte per element and holds normalised values, float32
            takes 1/8 and holds any.
    """
    flat = values.as_strided((values.numel(),), (1,))
    missing = -flat.numel() % GROUP
    if missing:
        flat = F.pad(flat, (0, missing))
    groups = flat.view(-1, GROUP)
    levels = 2**bits - 1
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low).div_(levels)
    low = low.to(range_dtype)
    step = step.to(range_dtype).clamp_(min=torch.finfo(range_dtype).tiny)
    if torch.compiler.is_compiling():  # which cannot follow a write through as_strided
        groups = groups.clone()
    scaled = groups.sub_(low).mul_(step.to(groups.dtype).reciprocal())
    scaled = scaled.add_(0.5).clamp_(0, levels + 0.5)
    # On the CPU the direct way to uint8 is one element at a time, several times as slow as all the rest.
    codes = scaled.to(torch.int8).view(torch.uint8) if bits == 4 else scaled.to(torch.int16).to(torch.uint8)
    return Quantized(_fold(codes.view(-1)) if bits == 4 else codes.view(-1), low, step)


def _fold(codes: Tensor) -> Tensor:
    """4-bit codes in half as many bytes, eight at a time."""
    words = codes.view(torch.int64)
    half = words.numel() // 2
    return words[half:].bitwise_left_shift(4).bitwise_or_(words[:half]).view(torch.uint8)


def _unfold(folded: Tensor) -> Tensor:
    """Inverse of :func:`_fold`."""
    words = folded.view(torch.int64)
    # The shift copies the sign into the highest bits, which the mask takes away.
    halves = torch.cat([words, words.bitwise_right_shift(4)]).bitwise_and_(_LOW_HALVES)
    return halves.view(torch.uint8)


def dequantize(
    quantized: Quantized, bits: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The middle of what every code stands for.

    Args:
        quantized: what :func:`quantize` returned.
        bits: as given to it.
        shape: shape of the tensor.
        stride: its strides.
        dtype: dtype of the result, which is computed in float32 at least.
    """
    codes, low, step = quantized
    wide = torch.promote_types(dtype, torch.float32)
    groups = (_unfold(codes) if bits == 4 else codes).to(wide).view(-1, GROUP)
    return groups.mul_(step).add_(low).to(dtype).as_strided(shape, stride)
