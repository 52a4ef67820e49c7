"""Flags of one bit per element, and gradients that pass through them.

Flags are kept in the memory order of the tensor that they belong to, whatever its memory format; no pass reorders
them. Packing reads eight bools as one 64-bit word and gathers their bits with one multiplication; unpacking copies
one entry of a table of 256, eight values of a byte each, for every byte. On one or two cores NumPy's kernels, one pass
each, do the same, and one pass in C where it was built (:mod:`lightning_lance.tensors.native`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.tensors import native
from lightning_lance.tensors.cached import constant
from lightning_lance.tensors.tracing import traced

# Bits 0, 9, 18 … 63. Times a word of eight bools, byte k of the word (0 or 1) lands on bit 63 - k, and no two of the
# partial products meet. The word and the bits are read in the same order, so that the byte order of the machine
# cancels out.
_GATHER = 0x8040201008040201 - (1 << 64)
_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)
_FEW_THREADS = 2  # so many of torch's are no faster than the one of NumPy
_FEW_FLAGS = 1 << 16  # nor are more, on so few


STRETCH = 1 << 18
"""Elements that are worked on at a time on the CPU: what is made on the way stays in its cache."""


def _one_pass(count: int, device: torch.device) -> bool:
    """Whether NumPy is the faster way for so many flags."""
    if device.type != "cpu" or traced():  # first: a compiler cannot follow the rest
        return False
    return count < _FEW_FLAGS or torch.get_num_threads() <= _FEW_THREADS


def pack_bits(flags: Tensor) -> Tensor:
    """Eight flags in a byte, in memory order.

    Args:
        flags: bool, any shape, without gaps or overlaps in memory, as every freshly computed tensor is. Its memory
            is overwritten.

    Returns:
        uint8 of shape ``(ceil(n / 8),)`` for ``n`` flags; the unused bits of the last byte are 0.
    """
    flat = flags.as_strided((flags.numel(),), (1,))
    if _one_pass(flat.numel(), flags.device):
        return torch.from_numpy(np.packbits(flat.numpy()))
    missing = -flat.numel() % 8
    if missing:
        flat = F.pad(flat, (0, missing))
    if torch.compiler.is_compiling():  # fuses with the comparison that makes the flags
        shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=flags.device)
        return (flat.view(-1, 8).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)
    return flat.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def pack_bits_of(
    tensor: Tensor, find: Callable[[Tensor], Tensor], between: tuple[float, float] | None = None
) -> Tensor:
    """Eight flags in a byte, in memory order; on the CPU they are found for a stretch at a time.

    Blocks of the tensor's own size, which the system would have to clear first, are not needed.

    Args:
        tensor: any shape, without gaps or overlaps in memory.
        find: makes a new tensor of the flags of a stretch, which has one axis; only the last one may be shorter.
        between: two numbers where a flag is set if neither ``x <= low`` nor ``x >= high``, one pass where there is one
            for it (:mod:`lightning_lance.tensors.native`); NaN: no bound.

    Returns:
        As :func:`pack_bits`.
    """
    count = tensor.numel()
    flat = tensor.as_strided((count,), (1,))
    if between is not None and native.takes(tensor):
        return native.pack_flags(flat, *between)
    size = min(count, STRETCH) if tensor.is_cpu else count
    if size == count:
        return pack_bits(find(flat))
    packed = torch.empty(-(-count // 8), dtype=torch.uint8)
    for start in range(0, count, size):
        end = min(start + size, count)
        packed[start // 8 : -(-end // 8)] = pack_bits(find(flat[start:end]))
    return packed


def expand_bits(
    bits: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], off: float, on: float, dtype: torch.dtype
) -> Tensor:
    """A value for every flag.

    Args:
        bits: what :func:`pack_bits` returned.
        shape: shape of the flags.
        stride: their strides.
        off: value where the flag is not set.
        on: value where it is.
        dtype: dtype of the result; ``torch.bool`` for 0 and 1.

    Returns:
        A new tensor of that shape, strides and dtype.
    """
    if torch.compiler.is_compiling():
        shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=bits.device)
        flat = ((bits.unsqueeze(-1) >> shifts) & 1).to(dtype)
        if (off, on) != (0, 1):
            values = torch.tensor((off, on), dtype=dtype, device=bits.device)
            flat = torch.where(flat != 0, values[1], values[0])
    elif native.makes_flags(bits, dtype):
        flat = native.expand_flags(bits, math.prod(shape), off, on, dtype)
    elif not _are_small(off, on):
        flat = expand_bits(bits, shape, stride, 0, 1, dtype).as_strided((math.prod(shape),), (1,))
        flat = flat.mul_(on - off).add_(off) if off else flat.mul_(on)
    else:
        count = math.prod(shape)
        if (off, on) == (0, 1) and _one_pass(count, bits.device):
            small = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).view(torch.int8)
        else:  # eight small values are copied as one word, and converted afterwards with vector instructions
            small = _table(int(off), int(on), bits.device).index_select(0, bits.int()).view(torch.int8)
        flat = small.view(torch.bool) if dtype == torch.bool else small.to(dtype)
    return flat.as_strided(shape, stride)


def _are_small(off: float, on: float) -> bool:
    """Whether both values are integers of a byte."""
    return all(float(value).is_integer() and abs(value) < 128 for value in (off, on))


@constant
def _table(off: int, on: int, device: torch.device) -> Tensor:
    """``(256,)`` int64, each the eight int8 values of a byte of flags."""
    shifts = torch.tensor(_SHIFTS, device=device)
    set_ = (torch.arange(256, device=device).unsqueeze(-1) >> shifts) & 1
    values = torch.tensor((off, on), dtype=torch.int8, device=device)
    return values.index_select(0, set_.view(-1)).view(torch.int64)
