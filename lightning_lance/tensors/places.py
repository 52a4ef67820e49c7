"""Indices of maxima, as max pooling returns them, kept as places in their windows: a few bits instead of 8 bytes."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lance.tensors import native
from lightning_lance.tensors.cached import constant
from lightning_lance.tensors.codes import codes_per_byte, pack_codes, unpack_codes, unpacking_table


class Window(NamedTuple):
    """Static arguments of a pooling operator, one number for each spatial axis.

    Attributes:
        kernel: window sizes.
        stride: strides.
        padding: symmetric padding.
        dilation: dilations.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def with_axis(self) -> Window:
        """The same window on inputs with one more axis before the others, of size 1."""
        return Window((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation))


def window(axes: int, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> Window:
    """Window from the arguments of a stock pooling operator, with any kind of integers, and ``axes`` spatial axes."""

    def numbers(value: Any) -> tuple[int, ...]:
        try:
            found: tuple[int, ...] = (operator.index(value),)
        except TypeError:
            found = tuple(map(operator.index, value))
        return found * axes if len(found) == 1 else found

    kernel = numbers(kernel_size)
    given = stride is not None and not (isinstance(stride, (tuple, list)) and not stride)
    return Window(kernel, numbers(stride) if given else kernel, numbers(padding), numbers(dilation))


class _Tables(NamedTuple):
    """Between indices into the input and places in the window.

    Attributes:
        start: int64, index of the first element of every window, broadcastable to the output.
        code: the place at each distance from the start of a window, in uint8 where that is enough.
        distance: int64, the distance of each place; those of all places in a byte where one holds several.
        per_byte: how many places one byte holds: 4, 2 or 1; 0 where a place takes more than a byte.
        single: int64, the distance of each place.
    """

    start: Tensor
    code: Tensor
    distance: Tensor
    per_byte: int
    single: Tensor


@constant
def _tables(sizes: tuple[int, ...], out_sizes: tuple[int, ...], window: Window, device: torch.device) -> _Tables:
    start = distance = torch.zeros((), dtype=torch.int64, device=device)
    longest = 0
    for axis, size in enumerate(sizes):
        first = torch.arange(out_sizes[axis], device=device) * window.stride[axis] - window.padding[axis]
        place = torch.arange(window.kernel[axis], device=device) * window.dilation[axis]
        start = start.unsqueeze(-1) * size + first
        distance = distance.unsqueeze(-1) * size + place
        longest = longest * size + (window.kernel[axis] - 1) * window.dilation[axis]
    distance = distance.flatten()
    count = math.prod(window.kernel)
    dtype = torch.uint8 if count <= 256 else torch.int16 if count <= 2**15 else torch.int32
    code = torch.zeros(longest + 1, dtype=dtype, device=device)
    # Where the window is wider than the input two places can lie at one distance; either code leads back to it.
    code[distance] = torch.arange(count, device=device).to(dtype)
    per_byte = codes_per_byte(count) if count <= 256 else 0
    table = unpacking_table(distance, per_byte) if per_byte else distance
    return _Tables(start.contiguous(), code, table, per_byte, distance)


def pack(index: Tensor, sizes: tuple[int, ...], window: Window) -> Tensor:
    """Places of maxima.

    Args:
        index: int64 ``(..., *out)``, without gaps in memory: of each maximum in the spatial axes of the input.
        sizes: spatial sizes of the input.
        window: static arguments.

    Returns:
        Codes on one axis, in the memory order of the indices.
    """
    tables = _tables(sizes, tuple(index.shape[-len(sizes) :]), window, index.device)
    if tables.per_byte and native.takes_indices(index):
        return native.pack_places(index, tables.start, tables.code, 8 // tables.per_byte)
    distance = index - tables.start
    codes = tables.code.index_select(0, distance.as_strided((index.numel(),), (1,)))
    return pack_codes(codes, tables.per_byte) if tables.per_byte else codes


def unpack(
    codes: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], sizes: tuple[int, ...], window: Window
) -> Tensor:
    """Indices of maxima, from what :func:`pack` returned.

    Args:
        codes: places.
        shape: of the indices.
        stride: of the indices.
        sizes: spatial sizes of the input.
        window: static arguments.

    Returns:
        int64, new.
    """
    tables = _tables(sizes, tuple(shape[-len(sizes) :]), window, codes.device)
    return unpack_codes(codes, tables.distance).as_strided(shape, stride).add_(tables.start)


def pool(input: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor] | None:
    """Maxima of the windows on two axes, and their places, as :func:`pack` returns them; ``None``: no pass for it.

    Args:
        input: ``(..., *sizes)``.
        window: static arguments.
        ceil_mode: as the stock operator's.
    """
    sizes = tuple(input.shape[-2:])
    axes = list(zip(sizes, *window, strict=False)) if all(len(numbers) == 2 for numbers in window) else []
    # What the stock operator refuses it should see. A dilated window may lie in the padding with all of its elements.
    if (
        input.dim() not in (3, 4)
        or not axes
        or math.prod(window.kernel) > 256
        or any(k < 1 or s < 1 or not 0 <= 2 * p <= k or d != 1 for _, k, s, p, d in axes)
        or input.dtype is not torch.float32
        or not (native.takes(input) and input.is_contiguous())
        or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))  # the result may be the latter
    ):
        return None
    out = out_sizes(sizes, window, ceil_mode)
    if min(out) < 1:
        return None
    bits = 8 // codes_per_byte(math.prod(window.kernel))
    return native.max_pool(input, out, window.kernel, window.stride, window.padding, bits)


def out_sizes(sizes: tuple[int, ...], window: Window, ceil_mode: bool) -> tuple[int, ...]:
    """Spatial sizes of what the stock operator returns."""

    def along(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
        last = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (-(-last // stride) if ceil_mode else last // stride) + 1
        return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count

    return tuple(along(*numbers) for numbers in zip(sizes, *window, strict=True))


def scatter(codes: Tensor, grad: Tensor, sizes: tuple[int, ...], window: Window) -> Tensor | None:
    """The gradient of what was pooled, from what :func:`pack` returned of contiguous indices; ``None``: no pass for it.

    Args:
        codes: places.
        grad: of the maxima ``(..., *out)``.
        sizes: spatial sizes of the input.
        window: static arguments.

    Returns:
        ``(..., *sizes)``, new.
    """
    tables = _tables(sizes, tuple(grad.shape[-len(sizes) :]), window, codes.device)
    if not tables.per_byte or grad.dtype is not torch.float32 or not native.takes(grad):
        return None
    bits = 8 // tables.per_byte
    return native.scatter_places(codes, tables.start, tables.single, bits, grad.contiguous(), sizes)
