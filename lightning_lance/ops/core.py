"""How a core is kept for backward: its elements as they are, or rounded to 4 or 8 bits each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.quantize import GROUP, Quantized, dequantize, quantize


class Form(NamedTuple):
    """What the codes of a rounded core are to become again.

    Attributes:
        bits: of a code.
        shape: of the core.
        stride: of the core.
        dtype: of the core.
    """

    bits: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Core(NamedTuple):
    """A core as it is kept, the tensors to be given to ``save_for_backward``.

    Attributes:
        values: the core, or the codes of its elements.
        low: range of each group of codes, see :class:`~lightning_lance.ops.quantize.Quantized`; else ``None``.
        step: likewise.
        form: ``None`` where ``values`` is the core.
    """

    values: Tensor | None
    low: Tensor | None = None
    step: Tensor | None = None
    form: Form | None = None


NOTHING = Core(None)
"""Kept where the weight needs no gradient."""


def core_bytes(elements: int, itemsize: int, bits: int | None) -> int:
    """Bytes that :func:`keep` needs.

    Args:
        elements: number of elements of the core.
        itemsize: bytes of each.
        bits: bits asked for; ``None``: as it is.
    """
    whole = elements * itemsize
    return whole if bits is None else min(whole, _rounded_bytes(elements, itemsize, bits))


def _rounded_bytes(elements: int, itemsize: int, bits: int) -> int:
    groups = -(-elements // GROUP)
    return groups * (GROUP * bits // 8 + 2 * (8 if itemsize == 8 else 4))


def keep(core: Tensor, bits: int | None, owned: bool = True) -> Core:
    """A core in few bits, or as it is where that would save nothing.

    Args:
        core: floating-point.
        bits: 4, 8 or ``None``.
        owned: whether its memory may be overwritten.
    """
    if bits is None or _rounded_bytes(core.numel(), core.element_size(), bits) >= core.numel() * core.element_size():
        return Core(core)
    work = core
    if core.dtype not in (torch.float32, torch.float64):
        work = core.float()
        owned = True
    if not owned or not _dense(work):
        work = work.clone(memory_format=torch.preserve_format)  # contiguous, unless it is dense in another order
    form = Form(bits, tuple(work.shape), work.stride(), core.dtype)
    # Ranges in full precision: the constant column of the batch is far from 0, and its spread may be small.
    return Core(*quantize(work, bits, work.dtype), form)


def rebuild(core: Core) -> Tensor:
    """The core, in its own shape, memory format and dtype."""
    values, low, step, form = core
    assert values is not None
    if form is None:
        return values
    assert low is not None
    assert step is not None
    return dequantize(Quantized(values, low, step), form.bits, form.shape, form.stride, form.dtype)


def keep_input(input: Tensor, factors: Factors, channel_axis: int, first_spatial: int) -> Core:
    """Project an input and keep its core; see :func:`~lightning_lance.ops.factors.compress` for the arguments."""
    core = compress(input, factors, channel_axis, first_spatial)
    return keep(core, factors.bits, owned=core is not input)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory once, in any order of the axes."""
    expected = 1
    for stride, size in sorted((n, size) for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
