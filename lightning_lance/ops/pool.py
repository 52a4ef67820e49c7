"""Pooling that keeps the place of the maximum in its window, or nothing but the shape of its input.

Forward and backward run the stock kernels; what changes is what lies between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops.backward import first_order_only
from lightning_lance.tensors.cached import constant
from lightning_lance.tensors.codes import codes_per_byte, pack_codes, unpack_codes, unpacking_table
from lightning_lance.tensors.tracing import eager_cpu

_aten: Any = torch.ops.aten
# Of the maxima of a contiguous input, found block by block: what a block measures, and from where on that is faster.
_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16
_CHANNELS = 16
_FEWEST_CHANNELS = 8
_FEWEST_ELEMENTS = 1 << 15


class Window(NamedTuple):
    """Static arguments of a pooling operator with ``len(kernel)`` spatial axes.

    Attributes:
        kernel: window sizes.
        stride: strides.
        padding: symmetric padding.
        dilation: dilations; ones for average pooling.
        ceil_mode: whether a window may end beyond the padded input.
        count_include_pad: average pooling: whether padding counts.
        divisor: average pooling: replaces the number of elements, or ``None``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool = True
    divisor: int | None = None


def _shape(window: Window) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation, as kernels take them; compilers up to 2.6 cannot slice a named tuple."""
    return list(window.kernel), list(window.stride), list(window.padding), list(window.dilation)


def _averaging(window: Window) -> tuple[bool, bool, int | None]:
    return window.ceil_mode, window.count_include_pad, window.divisor


Sizes = int | tuple[int, ...] | list[int]


def _tuple(value: Sizes, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def window(
    axes: int,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Window:
    """Window from the arguments of a stock pooling operator with ``axes`` spatial axes."""
    kernel = _tuple(kernel_size, axes)
    strides = _tuple(stride, axes) if stride is not None and stride != [] and stride != () else kernel
    return Window(kernel, strides, _tuple(padding, axes), _tuple(dilation, axes), ceil_mode, count_include_pad, divisor)


def _channels_last(input: Tensor, axes: int) -> torch.memory_format | None:
    """The channels-last format of an input that has it and not the contiguous one as well."""
    wanted = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    found = input.dim() == axes + 2 and input.is_contiguous(memory_format=wanted) and not input.is_contiguous()
    return wanted if found else None


def _run(
    kernel: Any, grad: Tensor, shape: tuple[int, ...], channels_last: torch.memory_format | None, *arguments: Any
) -> Tensor:
    """A stock backward kernel ``(grad, input, *arguments)``, which asks the input for shape and memory format only."""
    if channels_last is None:
        stand_in = grad.new_empty(1).expand(shape)
    else:
        stand_in = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=channels_last)
        if channels_last is torch.channels_last and not torch.compiler.is_compiling():
            # The buffer of the result stands in for the input. (Of the kernels in 3d not all can write channels last.)
            overload, name = (
                (kernel.grad_input, "grad_input") if "grad_input" in kernel.overloads() else (kernel.out, "out")
            )
            return overload(grad, stand_in, *arguments, **{name: stand_in})  # type: ignore[no-any-return]
    return kernel(grad, stand_in, *arguments)  # type: ignore[no-any-return]


class _Places(NamedTuple):
    """Tables between indices into the input and places in the window.

    Attributes:
        start: int64, index of the first element of every window, broadcastable to the output.
        code: the place at each distance from the start of a window, in uint8 where that is enough.
        distance: int64, the distance of each place; those of all places in a byte where one holds several.
        per_byte: how many places one byte holds: 4, 2 or 1; 0 where a place takes more than a byte.
    """

    start: Tensor
    code: Tensor
    distance: Tensor
    per_byte: int


@constant
def _places(sizes: tuple[int, ...], out_sizes: tuple[int, ...], window: Window, device: torch.device) -> _Places:
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
    return _Places(start, code, unpacking_table(distance, per_byte) if per_byte else distance, per_byte)


def _codes(index: Tensor, places: _Places) -> Tensor:
    """Places of the maxima, one axis in memory order. The indices are overwritten."""
    return places.code.index_select(0, index.sub_(places.start).as_strided((index.numel(),), (1,)))


def _pack(codes: Tensor, places: _Places) -> Tensor:
    return pack_codes(codes, places.per_byte) if places.per_byte else codes


def _pool(input: Tensor, window: Window) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Output, packed places of the maxima, and the strides by which these are in memory order."""
    axes = len(window.kernel)
    kernel = _aten.max_pool2d_with_indices if axes == 2 else _aten.max_pool3d_with_indices
    output, index = kernel(input, *_shape(window), window.ceil_mode)
    places = _places(tuple(input.shape[-axes:]), tuple(index.shape[-axes:]), window, input.device)
    return output, _pack(_codes(index, places), places), index.stride()


def _in_blocks(input: Tensor, axes: int) -> bool:
    """Whether :func:`_pool_blocks` takes this input, and is faster: with few elements starting its operators is not."""
    return (
        eager_cpu(input)  # a NaN in bfloat16 would come out with other bits
        and axes == 2
        and input.dim() == 4
        and input.is_contiguous()
        and not input.is_contiguous(memory_format=torch.channels_last)
        and input.shape[1] >= _FEWEST_CHANNELS
        and input.numel() >= _FEWEST_ELEMENTS * torch.get_num_threads()
    )


def _pool_blocks(input: Tensor, window: Window) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """:func:`_pool` of a contiguous input, a block of samples and channels at a time.

    The stock kernel takes one element after the other in the contiguous format, and uses vectors over channels in the
    other, where it finds the same maxima at the same places. A block is reordered, pooled and brought back while it is
    in the cache; nor are all indices, of eight bytes each, ever there at once.
    """
    batch, channels, *sizes = input.shape
    plane = math.prod(sizes) * input.element_size()
    wide = max(_CHANNELS, _SAMPLE_BYTES // plane // _CHANNELS * _CHANNELS)  # not more: their rows meet in the cache
    deep = max(1, _BLOCK_BYTES * torch.get_num_threads() // (min(wide, channels) * plane))
    out_sizes = _out_sizes(sizes, window)
    places = _places(tuple(sizes), out_sizes, window, input.device)
    output = input.new_empty((batch, channels, *out_sizes))
    codes = torch.empty(output.shape, dtype=places.code.dtype, device=input.device)
    for first, start in itertools.product(range(0, batch, deep), range(0, channels, wide)):
        some = slice(first, first + deep), slice(start, start + wide)
        block = input[some].contiguous(memory_format=torch.channels_last)
        output[some], index = _aten.max_pool2d_with_indices(block, *_shape(window), window.ceil_mode)
        codes[some] = _codes(index, places).as_strided(index.shape, index.stride())
    return output, _pack(codes.view(-1), places), output.stride()


def _out_sizes(sizes: Sequence[int], window: Window) -> tuple[int, ...]:
    """Sizes of the output; a last window that ``ceil_mode`` adds begins within the input or its left padding."""
    found = []
    for size, kernel, stride, padding, dilation in zip(sizes, *_shape(window), strict=True):
        room = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (-(-room // stride) if window.ceil_mode else room // stride) + 1
        found.append(count - (window.ceil_mode and (count - 1) * stride >= size + padding))
    return tuple(found)


def _decode(codes: Tensor, places: _Places, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Indices of the maxima, from packed codes."""
    index = unpack_codes(codes, places.distance).as_strided(shape, stride)
    return index + places.start if torch.compiler.is_compiling() else index.add_(places.start)


class MaxPool(torch.autograd.Function):
    """Maximum over windows, 2 or 3 spatial axes.

    Saved: the place of the maximum in its window, in 2, 4, 8, or 16 bits per output for windows of up to 4, 16, 256
    or more elements. ``apply(input, window)``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: Window) -> Tensor:
        axes = len(window.kernel)
        ctx.window, ctx.shape, ctx.channels_last = window, tuple(input.shape), _channels_last(input, axes)
        output, codes, ctx.index_stride = (_pool_blocks if _in_blocks(input, axes) else _pool)(input, window)
        ctx.index_shape = tuple(output.shape)
        ctx.save_for_backward(codes)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        window: Window = ctx.window
        axes = len(window.kernel)
        places = _places(ctx.shape[-axes:], ctx.index_shape[-axes:], window, grad.device)
        index = _decode(codes, places, ctx.index_shape, ctx.index_stride)
        kernel = _aten.max_pool2d_with_indices_backward if axes == 2 else _aten.max_pool3d_with_indices_backward
        arguments = (*_shape(window), window.ceil_mode, index)
        return _run(kernel, grad, ctx.shape, ctx.channels_last, *arguments), None


class AvgPool(torch.autograd.Function):
    """Mean over windows, 2 or 3 spatial axes. Saved: nothing. ``apply(input, window)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: Window) -> Tensor:
        axes = len(window.kernel)
        ctx.window, ctx.shape, ctx.channels_last = window, tuple(input.shape), _channels_last(input, axes)
        kernel: Any = F.avg_pool2d if axes == 2 else F.avg_pool3d
        return kernel(input, *_shape(window)[:3], *_averaging(window))  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        window: Window = ctx.window
        kernel = _aten.avg_pool2d_backward if len(window.kernel) == 2 else _aten.avg_pool3d_backward
        return _run(kernel, grad, ctx.shape, ctx.channels_last, *_shape(window)[:3], *_averaging(window)), None


class AdaptiveAvgPool(torch.autograd.Function):
    """Mean over windows that divide the input, 2 or 3 spatial axes. Saved: nothing. ``apply(input, output_size)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output_size: tuple[int, ...]) -> Tensor:
        axes = len(output_size)
        ctx.axes, ctx.shape, ctx.channels_last = axes, tuple(input.shape), _channels_last(input, axes)
        kernel: Any = F.adaptive_avg_pool2d if axes == 2 else F.adaptive_avg_pool3d
        return kernel(input, output_size)  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = _aten._adaptive_avg_pool2d_backward if ctx.axes == 2 else _aten._adaptive_avg_pool3d_backward
        return _run(kernel, grad, ctx.shape, ctx.channels_last), None


def max_pool(input: Tensor, window: Window) -> Tensor:
    """``torch.nn.functional.max_pool1d``, 2d or 3d that keeps a few bits per output element.

    Args:
        input: ``(B, C, *sizes)`` or ``(C, *sizes)``.
        window: static arguments, one to three spatial axes; see :func:`window`.

    Returns:
        ``(B, C, *out)`` or ``(C, *out)``.
    """
    return _apply(MaxPool, input, window)


def avg_pool(input: Tensor, window: Window) -> Tensor:
    """``torch.nn.functional.avg_pool1d``, 2d or 3d that keeps nothing; arguments as in :func:`max_pool`."""
    return _apply(AvgPool, input, window)


def _apply(function: Any, input: Tensor, window: Window) -> Tensor:
    if len(window.kernel) == 1:  # the stock operator does the same
        sizes = (1, *window.kernel), (1, *window.stride), (0, *window.padding), (1, *window.dilation)
        flat = Window(*sizes, *_averaging(window))
        return function.apply(input.unsqueeze(-2), flat).squeeze(-2)  # type: ignore[no-any-return]
    result: Tensor = function.apply(input, window)
    return result


def adaptive_avg_pool(input: Tensor, output_size: int | tuple[int | None, ...], axes: int) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool1d``, 2d or 3d that keeps nothing.

    Args:
        input: ``(B, C, *sizes)`` or ``(C, *sizes)``.
        output_size: as the stock operator takes it; ``None`` for the size of the input.
        axes: number of spatial axes, 1 to 3.

    Returns:
        ``(B, C, *output_size)`` or ``(C, *output_size)``. A global mean goes to the stock operator, which keeps
        nothing either.
    """
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * axes
    target = tuple(input.shape[i - axes] if size is None else size for i, size in enumerate(sizes))
    if axes == 1:
        target = (1, *target)
        input = input.unsqueeze(-2)
    if math.prod(target) == 1:
        kernel: Any = F.adaptive_avg_pool3d if axes == 3 else F.adaptive_avg_pool2d
        result: Tensor = kernel(input, target)
    else:
        result = AdaptiveAvgPool.apply(input, target)
    return result.squeeze(-2) if axes == 1 else result
