"""How a core is kept for backward: its elements as they are, or rounded to 4 or 8 bits each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.ops.factors import Factors, compress
from lightning_lance.tensors.precision import core_bytes
from lightning_lance.tensors.rounding import Quantized, dequantize, quantize


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
        low: range of each group of codes, or ``None``; see :class:`~lightning_lance.tensors.rounding.Quantized`.
        step: likewise.
        form: ``None`` where ``values`` is the core.
    """

    values: Tensor | None
    low: Tensor | None = None
    step: Tensor | None = None
    form: Form | None = None


NOTHING = Core(None)
"""Kept where the weight needs no gradient."""


def keep(core: Tensor, bits: int | None, owned: bool = True) -> Core:
    """A core in few bits, or as it is where that would save nothing.

    Args:
        core: floating-point.
        bits: 4, 8 or ``None``.
        owned: whether its memory may be overwritten.
    """
    whole = core.numel() * core.element_size()
    if core_bytes(core.numel(), core.element_size(), bits) == whole:
        return Core(core)
    assert bits is not None
    work = core
    if core.dtype not in (torch.float32, torch.float64):
        work = core.float()
        owned = True
    if not _dense(work):
        work, owned = work.clone(memory_format=torch.preserve_format), True  # contiguous then
    form = Form(bits, tuple(work.shape), work.stride(), core.dtype)
    return Core(*quantize(work, bits, owned), form)


def rebuild(core: Core) -> Tensor:
    """The core, in its own shape, memory format and dtype."""
    values, low, step, form = core
    assert values is not None
    if form is None:
        return values
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
