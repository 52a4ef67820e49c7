"""Tensors kept in 4 or 8 bits per element, with a range of their own for every group of neighbours in memory.

Uniform levels between the smallest and the largest of 64 elements, as in ActNN (Chen et al., ICML 2021, section 3)
and GACT (Liu et al., ICML 2022), but rounded to the nearest level: no random numbers are drawn.

On the CPU this is one pass of torch's kernels for the rows of embedding tables, a group being a row, where torch has
them: the rest are a dozen operators. Both weigh the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.tensors.precision import GROUP
from lightning_lance.tensors.tracing import eager_cpu

_LOW_HALVES = 0x0F0F0F0F0F0F0F0F
# Bits of a float16 but its sign, which compare like the numbers.
_MAGNITUDE, _ONE, _INFINITY, _SMALLEST = 0x7FFF, 0x3C00, 0x7C00, 0x0800  # the last: 2 ** -13


class Quantized(NamedTuple):
    """A quantised tensor of ``n`` elements.

    Attributes:
        codes: uint8; of 4 bits each, a byte holds one of the first and one of the second half of the tensor. Or a row
            for each group as torch's kernels write it, its range included.
        low: ``(ceil(n / 64), 1)``, the value of code 0 in each group: bfloat16 for 4 bits, float32 for 8; ``None``
            where the rows hold it.
        step: same shape and dtype, from one level to the next.
    """

    codes: Tensor
    low: Tensor | None
    step: Tensor | None


def quantize(values: Tensor, bits: int, owned: bool = True) -> Quantized:
    """Quantise a tensor in memory order.

    An infinite element makes its whole group infinite or NaN; a NaN does too, or becomes one of the levels.

    Args:
        values: float32 or float64, without gaps or overlaps in memory.
        bits: 4 or 8.
        owned: whether its memory may be overwritten.
    """
    flat = values.as_strided((values.numel(),), (1,))
    missing = -flat.numel() % GROUP
    if missing:
        flat = F.pad(flat, (0, missing))
    groups = flat.view(-1, GROUP)
    if values.dtype == torch.float32 and values.numel() and eager_cpu(values):
        rows = _rows(groups, bits)
        if rows is not None:
            return Quantized(rows, None, None)
    if torch.compiler.is_compiling() or not (owned or missing):  # the former cannot follow a write through as_strided
        groups = groups.clone()
    levels = 2**bits - 1
    low, step = _range(groups, bits)
    scaled = groups.sub_(low).mul_(step.to(groups.dtype).reciprocal())
    scaled = scaled.add_(0.5).clamp_(0, levels + 0.5)
    # On the CPU the direct way to uint8 is one element at a time, several times as slow as all the rest.
    codes = scaled.to(torch.int8).view(torch.uint8) if bits == 4 else scaled.to(torch.int16).to(torch.uint8)
    return Quantized(_fold(codes.view(-1)) if bits == 4 else codes.view(-1), low, step)


def _range(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Value of code 0 and step of each group."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = 2**bits - 1
    if bits == 8:
        step, low = (high - low).div_(levels).float(), low.float()
    else:
        # Rounded outwards, for bfloat16 has eight significant bits: the levels still reach from end to end.
        low = (low - low.abs() * 2**-8).bfloat16()
        step = (high - low).mul_((1 + 2**-8) / levels).bfloat16()
    return low, step.clamp_(min=torch.finfo(step.dtype).tiny)


@functools.cache
def _kernels(bits: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Torch's kernels for rows, one to quantise and one for the way back, where they are vectorised."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    name = {4: "embedding_bag_4bit", 8: "embedding_bag_byte"}[bits]
    try:
        return getattr(torch.ops.quantized, name + "_prepack"), getattr(torch.ops.quantized, name + "_unpack")
    except AttributeError:
        return None


def _rows(groups: Tensor, bits: int) -> Tensor | None:
    """Each group as a row of torch's kernels; ``None`` where these cannot hold it.

    Their range is a step and an offset in float16 for 4 bits, which large and small numbers leave (for a group without
    a spread the step is 1), and for 8 bits in float32, but with 1e-8 added to the spread.
    """
    kernels = _kernels(bits)
    if kernels is None:
        return None
    rows: Any = kernels[0](groups)
    if bits == 8:
        step = rows.view(torch.float32)[:, -2].amax().item()
        return rows if 1e-5 < step < torch.inf else None
    ranges = rows.view(torch.int16)[:, -2:].bitwise_and(_MAGNITUDE)
    largest = ranges.amax().item()
    if largest == _ONE:
        largest = ranges.masked_fill_(ranges == _ONE, 0).amax().item()
    return rows if _SMALLEST <= largest < _INFINITY else None


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
    if low is None or step is None:
        kernels = _kernels(bits)
        assert kernels is not None
        return kernels[1](codes).to(dtype).as_strided(shape, stride)
    wide = torch.promote_types(dtype, torch.float32)
    groups = (_unfold(codes) if bits == 4 else codes).to(wide).view(-1, GROUP)
    return groups.mul_(step).add_(low).to(dtype).as_strided(shape, stride)
