"""The passes over memory that a step makes for each activation, in C where a compiler was there to build them.

One pass each, on as many threads as torch has: flags of one bit, rows of 4 or 8 bits in the format of torch's kernels
for embedding tables, and the way back, with a normalisation and a clamp on the way. Where the module was not built, or
the environment says ``LANCE_NATIVE=0``, or a tensor is none for it, the callers take torch's kernels and NumPy's, in
several passes.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_core: Any = torch._C
_INTERFACE = 4  # of the module that this one was written for: an older one may lie beside it
_native: Any = None
if os.environ.get("LANCE_NATIVE") != "0" and sys.byteorder == "little":
    with suppress(ImportError):  # it was not built
        _found: Any = importlib.import_module("lightning_lance.tensors._native")
        _native = _found if _found.INTERFACE == _INTERFACE else None

LONGEST = 256
"""Elements of the longest row."""

_FEW = 1 << 15  # elements that one thread is done with before another has begun
_dispatch_modes: Any = _core._len_torch_dispatch_stack
_transforms: Any = _core._are_functorch_transforms_active
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Affine(NamedTuple):
    """``x * factor[c] + term[c]`` for each channel ``c`` of a tensor ``(B, C, ...)`` that fills a stretch of memory.

    Attributes:
        factor: ``(C,)`` float32.
        term: ``(C,)`` float32.
        inner: neighbours in memory of the same channel, which is the stride of channels.
    """

    factor: Tensor
    term: Tensor
    inner: int

    @classmethod
    def of(cls, factor: Tensor, term: Tensor, stride: tuple[int, ...]) -> Affine:
        """For a tensor ``(B, C, ...)`` of these strides, whose elements fill a stretch of memory once."""
        return cls(factor.float().contiguous(), term.float().contiguous(), max(1, stride[1]))


class Rows(NamedTuple):
    """Rows as torch's kernels for embedding tables write them.

    Attributes:
        codes: ``(rows, bytes)`` uint8, with the range of each at its end.
        largest: number of all ranges: the bits of a float16 with 4 bits, of a float32 and of steps alone with 8.
    """

    codes: Tensor
    largest: int


def takes(tensor: Tensor) -> bool:
    """Whether there is a pass in C over the elements of this tensor, which lies without gaps."""
    return tensor.dtype in _DTYPES and _plain(tensor)


def makes(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a pass in C from these rows to elements of this dtype."""
    return _native is not None and codes.is_cpu and dtype in _DTYPES and not _watched()


def makes_flags(bits: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a pass in C from these bits to elements of this dtype."""
    return _native is not None and bits.is_cpu and dtype.itemsize <= 8 and not _watched()


def takes_indices(index: Tensor) -> bool:
    """Whether there is a pass in C over these indices."""
    return index.dtype is torch.int64 and index.is_contiguous() and _plain(index)


def gates(gradient: Tensor) -> bool:
    """Whether there is a pass in C over the elements of this gradient that reads flags."""
    return gradient.element_size() in (2, 4) and _plain(gradient)


def _plain(tensor: Tensor) -> bool:
    return (
        _native is not None
        and tensor.is_cpu
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and _core._has_storage(tensor)  # not those of torch.autograd.grad(is_grads_batched=True)
        and not _watched()
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _watched() -> bool:
    """Whether a compiler, a transform, or a mode that sees every operator would miss what runs here."""
    return _dispatch_modes() > 0 or _transforms() or torch.compiler.is_compiling()


def pack_flags(flat: Tensor, low: float, high: float) -> Tensor:
    """Eight flags in a byte, the first one in its highest bit: set where neither ``x <= low`` nor ``x >= high``.

    Args:
        flat: one axis, contiguous.
        low: below all elements: no lower bound.
        high: NaN: no upper bound.

    Returns:
        uint8 of shape ``(ceil(n / 8),)``; the unused bits of the last byte are 0.
    """
    count = flat.numel()
    packed = torch.empty(-(-count // 8), dtype=torch.uint8, device="cpu")
    _native.pack_flags(flat.data_ptr(), count, _DTYPES[flat.dtype], low, high, packed.data_ptr(), _threads(count))
    return packed


def expand_flags(bits: Tensor, count: int, off: float, on: float, dtype: torch.dtype) -> Tensor:
    """One of two values for every flag.

    Args:
        bits: what :func:`pack_flags` returned.
        count: how many.
        off: value where a flag is not set.
        on: value where it is.
        dtype: dtype of the result, any.

    Returns:
        New tensor ``(count,)``.
    """
    values = _two(off, on, dtype)
    found = torch.empty(count, dtype=dtype, device="cpu")
    _native.expand_flags(
        bits.data_ptr(), count, values.data_ptr(), values.element_size(), found.data_ptr(), _threads(count)
    )
    return found


@functools.lru_cache(maxsize=256)
def _two(off: float, on: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor((off, on), dtype=dtype, device="cpu")


def gate(bits: Tensor, gradient: Tensor, found: Tensor) -> None:
    """A gradient where a flag is set, zero elsewhere.

    Args:
        bits: as :func:`pack_flags` returned them.
        gradient: one axis, contiguous, of 2 or 4 bytes an element.
        found: as many of the same dtype, without gaps in memory; gets the result.
    """
    count = gradient.numel()
    _native.gate(
        bits.data_ptr(), count, gradient.data_ptr(), gradient.element_size(), found.data_ptr(), _threads(count)
    )


def pack_places(index: Tensor, start: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Places of maxima in their windows, packed as those of :mod:`lightning_lance.tensors.codes`.

    Args:
        index: int64, contiguous, of each maximum in its map; maps one after the other.
        start: int64, contiguous, of the elements of one map: where each window begins.
        codes: uint8, the place at each distance from there.
        bits: of a place: 2, 4 or 8.
    """
    count = index.numel()
    packed = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device="cpu")
    _native.pack_places(
        *(index.data_ptr(), count, start.numel(), start.data_ptr(), codes.data_ptr(), codes.numel(), bits),
        *(packed.data_ptr(), _threads(count)),
    )
    return packed


def max_pool(
    input: Tensor,
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Maxima of windows on the last two axes, and the place of each, which lie as :func:`pack_places` packs them.

    Args:
        input: float32, contiguous.
        out: sizes of the result, so that each window has an element in the map.
        kernel: sizes of a window.
        stride: from one to the next.
        padding: before the first element.
        bits: of a place.

    Returns:
        New tensor ``(..., *out)``, as torch's kernel makes it, and uint8.
    """
    leading = input.shape[:-2]
    result = torch.empty((*leading, *out), dtype=input.dtype, device="cpu")
    packed = torch.empty(-(-result.numel() * bits // 8), dtype=torch.uint8, device="cpu")
    _native.max_pool(
        *(input.data_ptr(), leading.numel(), *input.shape[-2:], *out, *kernel, *stride, *padding, bits),
        *(result.data_ptr(), packed.data_ptr(), _threads(input.numel())),
    )
    return result, packed


def scatter_places(
    packed: Tensor, start: Tensor, distance: Tensor, bits: int, gradient: Tensor, sizes: tuple[int, ...]
) -> Tensor:
    """Gradients of maxima, added up where these were.

    Args:
        packed: as :func:`pack_places` returned it.
        start: as there.
        distance: int64, the distance of each place from the start of its window.
        bits: of a place.
        gradient: ``(..., *out)`` float32, contiguous.
        sizes: of a map of the input.

    Returns:
        New tensor ``(..., *sizes)``.
    """
    leading = gradient.shape[: -len(sizes)]
    found = torch.empty((*leading, *sizes), dtype=gradient.dtype, device="cpu")
    _native.scatter_places(
        *(packed.data_ptr(), leading.numel(), start.numel(), math.prod(sizes), start.data_ptr(), distance.data_ptr()),
        *(bits, gradient.data_ptr(), found.data_ptr(), _threads(found.numel())),
    )
    return found


def pack_rows(flat: Tensor, bits: int, group: int, scale: float = 1.0, affine: Affine | None = None) -> Rows | None:
    """Round a stretch of memory, each group to a row; ``None`` where there is no pass for it.

    Args:
        flat: one axis, contiguous.
        bits: of an element; there are passes for 4 and 8.
        group: even number of elements of a row, from 16 to 256; the last row is filled up with the last element.
        scale: every element is multiplied by it first.
        affine: and changed by its channel after that.
    """
    if bits not in (4, 8) or group > LONGEST or not takes(flat) or not flat.is_contiguous():
        return None
    count = flat.numel()
    rows = -(-count // group)
    codes = torch.empty(rows, group * bits // 8 + (8 if bits == 8 else 4), dtype=torch.uint8, device="cpu")
    largest = _native.pack_rows(
        *(flat.data_ptr(), count, _DTYPES[flat.dtype], group, bits, scale),
        *_pointers(affine),
        *(0, 0.0, 0.0, codes.data_ptr(), _threads(count)),
    )
    return Rows(codes, largest)


def expand_rows(
    codes: Tensor,
    count: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    scale: float = 1.0,
    affine: Affine | None = None,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """The value of every code.

    Args:
        codes: as :func:`pack_rows` returned them.
        count: elements.
        bits: of an element.
        group: elements of a row.
        dtype: float32 or bfloat16; all is computed in float32.
        scale: every value is multiplied by it first.
        affine: and changed by its channel after that.
        bounds: and then clamped to these.

    Returns:
        New tensor ``(count,)``.
    """
    found = torch.empty(count, dtype=dtype, device="cpu")
    low, high = bounds or (-math.inf, math.inf)
    _native.expand_rows(
        *(codes.data_ptr(), count, _DTYPES[dtype], group, bits, scale),
        *_pointers(affine),
        *(bounds is not None, low, high, found.data_ptr(), _threads(count)),
    )
    return found


def levels(codes: Tensor, group: int, scale: float = 1.0) -> Tensor:
    """What each of the sixteen codes of a row with 4 bits stands for.

    Args:
        codes: as :func:`pack_rows` returned them.
        group: elements of a row.
        scale: every value is multiplied by it.

    Returns:
        ``(rows, 16)`` float32.
    """
    found = torch.empty(codes.shape[0], 16, dtype=torch.float32, device="cpu")
    _native.list_levels(codes.data_ptr(), codes.shape[0], group, scale, found.data_ptr(), _threads(found.numel()))
    return found


def look_up(codes: Tensor, group: int, table: Tensor, found: Tensor, gradient: Tensor | None) -> None:
    """The entry of each code in the table of its row.

    Args:
        codes: as :func:`pack_rows` returned them, with 4 bits.
        group: elements of a row.
        table: ``(rows, 16)`` float32, contiguous.
        found: one axis, contiguous, float32 or bfloat16; gets the result.
        gradient: what the entries are multiplied by, of the same shape and dtype, contiguous; ``None``: one.
    """
    count = found.numel()
    _native.look_up(
        *(codes.data_ptr(), count, _DTYPES[found.dtype], group, table.data_ptr()),
        *(0 if gradient is None else gradient.data_ptr(), found.data_ptr(), _threads(count)),
    )


def norm_backward(
    codes: Tensor,
    bits: int,
    group: int,
    scale: float,
    affine: Affine | None,
    inner: int,
    gradient: Tensor,
    factor: Tensor,
    found: Tensor | None,
    fixed: bool,
) -> Tensor:
    """The backward pass of a normalisation of channels, whose input lies in rows.

    Args:
        codes: as :func:`pack_rows` returned them.
        bits: of an element.
        group: elements of a row.
        scale: every value is multiplied by it first.
        affine: makes the normalised input of the values; ``None``: they are it.
        inner: neighbours in memory of the same channel.
        gradient: of the result, one axis, contiguous, in the memory order of the input, float32 or bfloat16.
        factor: ``(C,)`` float32, what the normalised input is multiplied by over its deviation.
        found: as many elements of the same dtype, without gaps in memory; gets the gradient of the input. ``None``: it
            is not asked for.
        fixed: whether the statistics do not depend on the input.

    Returns:
        ``(2, C)`` float32: for each channel the sum of the gradients, and of their products with the normalised input.
    """
    count, channels = gradient.numel(), factor.numel()
    sums = torch.empty(2, channels, dtype=torch.float32, device="cpu")
    first, term, *_ = _pointers(affine)
    _native.norm_backward(
        *(codes.data_ptr(), count, _DTYPES[gradient.dtype], group, bits, scale, first, term, channels, inner),
        *(gradient.data_ptr(), factor.data_ptr(), fixed, sums.data_ptr()),
        *(0 if found is None else found.data_ptr(), _threads(count)),
    )
    return sums


def _pointers(affine: Affine | None) -> tuple[int, int, int, int]:
    if affine is None:
        return 0, 0, 1, 1
    return affine.factor.data_ptr(), affine.term.data_ptr(), affine.factor.numel(), affine.inner


def _threads(count: int) -> int:
    return torch.get_num_threads() if count > _FEW else 1
