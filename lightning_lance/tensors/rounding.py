"""Tensors kept in 2, 4 or 8 bits per element, with a range of their own for every group of neighbours in memory.

Sixteen bits are those of a bfloat16, whose error is a share of each element, however small.

Even levels between the smallest and the largest of about 128 elements, as in ActNN (Chen et al., ICML 2021, section 3)
and GACT (Liu et al., ICML 2022), rounded to the nearest. With 2 bits what is beyond 1.5 deviations becomes an end:
about an eighth of normal numbers, and large values of a skewed group come out too small. With dither the mean would be
right between the ends and the error larger; small trainings learn no better with it.

On the CPU 4 and 8 bits are one pass in C (:mod:`lightning_lance.tensors.native`), or one of
torch's kernels for the rows of embedding tables, a group being a row, which write the same bytes; elsewhere a dozen
operators. All weigh the same but for 2 bytes a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.tensors import native
from lightning_lance.tensors.bits import STRETCH
from lightning_lance.tensors.cached import constant
from lightning_lance.tensors.codes import pack_codes, unpack_codes, unpacking_table

GROUP = 128
"""Neighbours in memory that share a range, where :func:`group_size` knows no better."""

SMALLEST_GROUP, _MOST = 64, 256

FEWEST = 256
"""Tensors of fewer elements stay whole."""

_MAGNITUDE, _INFINITY, _SMALLEST = 0x7FFF, 0x7C00, 0x0800  # of a float16, without its sign; the last: 2 ** -13
_ONE = 0x3C00
_MAGNITUDE_SINGLE, _INFINITY_SINGLE, _SMALLEST_STEP = 0x7FFFFFFF, 0x7F800000, 0x3727C5AC  # of a float32; 1e-5


class Rounded(NamedTuple):
    """A rounded stretch of memory.

    Attributes:
        codes: uint8; a row for each group as torch's kernels write it, its range included; or bfloat16.
        low: ``(groups, 1)``, the value of code 0 in each group; ``None`` where the rows hold it.
        step: same shape, from one level to the next.
        elements: how many; the last group is filled up.
        bits: of a code.
        group: neighbours that share a range.
        scale: what the elements were multiplied by, so that float16 holds their ranges.
    """

    codes: Tensor
    low: Tensor | None
    step: Tensor | None
    elements: int
    bits: int
    group: int = GROUP
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges."""
        return sum(tensor.nbytes for tensor in (self.codes, self.low, self.step) if tensor is not None)


def kept_bytes(elements: int, itemsize: int, bits: int | None, group: int = GROUP) -> int:
    """Bytes of so many elements, rounded where that saves something.

    Args:
        elements: number of elements; the last group is filled up.
        itemsize: bytes of each as it is.
        bits: 2, 4 or 8; ``None``: as it is. The two numbers of a range have 2 bytes each with 2 and 4 bits, 4 with 8.
        group: neighbours that share a range.
    """
    whole = elements * itemsize
    if bits is None or elements < FEWEST:
        return whole
    return min(whole, -(-elements // group) * (group * bits // 8 + (8 if bits == 8 else 4)))


@functools.lru_cache(maxsize=1024)
def group_size(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many neighbours of a tensor should share a range: about 128, and no more than what belongs together.

    The rows of tokens, and the maps of channels, differ in size; a group that holds the end of one and the beginning of
    the next has the range of the larger.

    Args:
        shape: of the tensor.
        stride: its strides.

    Returns:
        An even number from 64 to 256.
    """
    inner = period = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != period:
            break
        period *= size
        if period >= SMALLEST_GROUP:
            break
        inner = period
    return _group_size(inner, period)


def _group_size(inner: int, period: int) -> int:
    """A multiple of what lies innermost and a part of all of it, as near to the usual size as can be."""
    sizes = (*range(GROUP, SMALLEST_GROUP - 1, -2), *range(GROUP + 2, _MOST + 1, 2))
    group: int
    for group in sizes:
        if group % inner == 0 and period % group == 0:
            return group
    if period < SMALLEST_GROUP:
        for group in range(period, _MOST + 1, period):
            if group >= SMALLEST_GROUP and group % 2 == 0:
                return group
    return next((group for group in sizes if period % group == 0), GROUP)


def round_to_bits(flat: Tensor, bits: int, group: int = GROUP, affine: native.Affine | None = None) -> Rounded | None:
    """Round a stretch of memory.

    Args:
        flat: one axis, contiguous, floating point.
        bits: 2, 4, 8 or 16.
        group: neighbours that share a range, an even number.
        affine: changes elements on the way, where :func:`rounds_in_one_pass` says so.

    Returns:
        ``None`` where an element is infinite, which no range holds, or where changed ones are far from one. A NaN may
        become one of the levels.
    """
    count = flat.numel()
    if bits == 16:
        return Rounded(flat.bfloat16(), None, None, count, bits)
    rows = native.pack_rows(flat, bits, group, 1.0, affine)
    if rows is not None:
        if _fits(rows.largest, bits):
            return Rounded(rows.codes, None, None, count, bits, group)
        size = flat.abs().amax().item()
        if affine is not None or not math.isfinite(size):
            return None
        scale = 1.0 if size == 0.0 else _scale(size)
        rows = native.pack_rows(flat, bits, group, scale)
        return None if rows is None else Rounded(rows.codes, None, None, count, bits, group, scale)
    if affine is not None:
        return None
    missing = -count % group
    if missing:  # filled with the last element, so that the range of its group stays as it is
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    groups = flat.view(-1, group)
    if bits > 2 and groups.is_cpu and type(groups) is Tensor:
        kernels = _kernels(bits)
        if kernels is not None:
            return _rows(groups, count, bits, kernels[0])
    groups = groups.float()
    low, high = _ends(groups, bits)
    if not bool((high - low).isfinite().all()):
        return None
    levels = 2**bits - 1
    low, step = _range(low, high, levels, bits)
    codes = _code(groups, low, step, levels)
    return Rounded(pack_codes(codes, 8 // bits), low, step, count, bits, group)


def _ends(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What the lowest and the highest level of each group stand for.

    Four levels from end to end would lie far apart: what is beyond 1.5 deviations is cut, which has the least error for
    normal numbers (Max, 1960, table II) and for those cut at 0.
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if bits > 2:
        return low, high
    deviation, mean = torch.std_mean(groups, dim=-1, keepdim=True, correction=0)
    return torch.maximum(low, mean - 1.5 * deviation), torch.minimum(high, mean + 1.5 * deviation)


def _code(groups: Tensor, low: Tensor, step: Tensor, levels: int) -> Tensor:
    scaled = groups.sub(low).mul_(step.float().reciprocal()).add_(0.5).clamp_(0, levels + 0.5)
    # On the CPU the direct way to uint8 is one element at a time, several times as slow as all the rest.
    codes = scaled.to(torch.int8).view(torch.uint8) if levels < 128 else scaled.to(torch.int16).to(torch.uint8)
    return codes.view(-1)


def _range(low: Tensor, high: Tensor, levels: int, bits: int) -> tuple[Tensor, Tensor]:
    """Value of code 0 and step of each group, as they are kept."""
    if bits == 8:
        step = (high - low).div_(levels)
    else:
        # Rounded outwards, for bfloat16 has eight significant bits: the levels still reach from end to end.
        low = (low - low.abs() * 2**-8).bfloat16()
        step = (high - low).mul_((1 + 2**-8) / levels).bfloat16()
    return low, step.clamp_(min=torch.finfo(step.dtype).tiny)


@functools.cache
def _kernels(bits: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Torch's kernels for rows, one to round and one for the way back, where they are vectorised."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    name = {2: "embedding_bag_2bit", 4: "embedding_bag_4bit", 8: "embedding_bag_byte"}[bits]
    try:
        return getattr(torch.ops.quantized, name + "_prepack"), getattr(torch.ops.quantized, name + "_unpack")
    except AttributeError:
        return None


def _rows(groups: Tensor, count: int, bits: int, pack: Callable[[Tensor], Tensor]) -> Rounded | None:
    """Each group as a row of torch's kernels, scaled where their float16 cannot hold a range."""
    rows = pack(groups) if groups.dtype is torch.float32 else _by_stretches(groups, pack)
    if bits == 8:
        largest = int(rows[:, -8:].contiguous().view(torch.int32)[:, 0].bitwise_and(_MAGNITUDE_SINGLE).amax().item())
    else:
        ends = rows[:, -4:]
        if rows.shape[1] % 2:
            ends = ends.contiguous()
        ranges = ends.view(torch.int16).bitwise_and(_MAGNITUDE)
        largest = int(ranges.amax().item())
        if largest == _ONE:  # the step of a group without a spread
            largest = int(ranges.masked_fill_(ranges == _ONE, 0).amax().item())
    if _fits(largest, bits):
        return Rounded(rows, None, None, count, bits, groups.shape[1])
    groups = groups.float()
    size = groups.abs().amax().item()
    if not math.isfinite(size):
        return None
    if size == 0.0:
        return Rounded(rows, None, None, count, bits, groups.shape[1])
    scale = _scale(size)
    return Rounded(pack(groups * scale), None, None, count, bits, groups.shape[1], scale)


def _fits(largest: int, bits: int) -> bool:
    """Whether ranges whose largest number is this, by the bits of a float, are held: with 8 bits steps alone count."""
    if bits == 8:  # of a float32; 1e-8 is added to the spread
        return _SMALLEST_STEP < largest < _INFINITY_SINGLE
    return _SMALLEST <= largest < _INFINITY


def _scale(size: float) -> float:
    """What brings elements of this size near to one."""
    return float(2.0 ** (4 - max(math.frexp(size)[1], -110)))


def rounds_in_one_pass(tensor: Tensor, bits: int) -> bool:
    """Whether elements may be changed by channel while they are rounded."""
    return bits in (4, 8) and native.takes(tensor)


def expand_changed(
    rounded: Rounded, dtype: torch.dtype, affine: native.Affine, bounds: tuple[float, float] | None
) -> Tensor | None:
    """The value of every code, changed by channel and clamped in the same pass; ``None`` where there is no such.

    Args:
        rounded: what :func:`round_to_bits` returned.
        dtype: dtype of the result, which is computed in float32.
        affine: by channel.
        bounds: what values are clamped to; ``None``: they are not.
    """
    codes, low, _, count, bits, group, scale = rounded
    if bits == 16 or low is not None or group > native.LONGEST or not native.makes(codes, dtype):
        return None
    return native.expand_rows(codes, count, bits, group, dtype, 1 / scale, affine, bounds)


def map_elements(
    rounded: Rounded, function: Callable[[Tensor], Tensor], found: Tensor, gradient: Tensor | None = None
) -> bool:
    """A function of every element, which is asked for the sixteen levels of each group alone, times a gradient.

    Args:
        rounded: what :func:`round_to_bits` returned.
        function: elementwise, of float32.
        found: as many elements, float32 or bfloat16, without gaps in memory; gets the result, computed in float32.
        gradient: one axis, contiguous, of that dtype; ``None``: one.

    Returns:
        Whether there was a pass for it.
    """
    codes, low, _, count, bits, group, scale = rounded
    if bits != 4 or low is not None or group > native.LONGEST or not native.makes(codes, found.dtype):
        return False
    some = STRETCH // 16
    flat = found.as_strided((count,), (1,))
    for row in range(0, codes.shape[0], some):
        part = codes[row : row + some]
        table = function(native.levels(part, group, 1 / scale)).contiguous()
        here = slice(row * group, min(count, (row + some) * group))
        native.look_up(part, group, table, flat[here], None if gradient is None else gradient[here])
    return True


_FAR = 60
"""Steps from zero, as far as which the error of a bfloat16 is small next to that of rounding to a level."""


def is_far(rounded: Rounded) -> bool:
    """Whether elements lie so far from zero that a bfloat16 is no better than their levels, and adds to the error."""
    codes, low, step, _, bits, *_ = rounded
    if bits == 16:
        return True
    if low is None or step is None:
        ranges = (
            codes[:, -8:].contiguous().view(torch.float32) if bits == 8 else codes[:, -4:].contiguous().view(torch.half)
        )
        step, low = ranges[:, 0], ranges[:, 1]
    return bool(low.float().norm() > _FAR * step.float().norm())


def _by_stretches(groups: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows of groups in another precision, of which a stretch at a time is in float32."""
    count = max(1, STRETCH // groups.shape[1])
    some = torch.empty(min(count, groups.shape[0]), groups.shape[1], dtype=torch.float32)
    parts = [pack(some[: part.shape[0]].copy_(part)) for part in torch.split(groups, count)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def expand(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """The value of every code.

    Args:
        rounded: what :func:`round_to_bits` returned.
        dtype: dtype of the result, which is computed in float32.

    Returns:
        New tensor ``(elements,)``.
    """
    codes, low, step, count, bits, group, scale = rounded
    if bits == 16:
        return codes.to(dtype)
    if low is None or step is None:
        kernels = _kernels(bits)
        # Without torch's kernels nobody but C can read what C has written, whoever watches.
        if kernels is None or (group <= native.LONGEST and native.makes(codes, dtype)):
            made = dtype if dtype is torch.bfloat16 else torch.float32
            return native.expand_rows(codes, count, bits, group, made, 1 / scale).to(dtype)
        if dtype is not torch.float32:
            return _expanded(codes, dtype, kernels[1], scale)[:count]
        flat = kernels[1](codes).view(-1)
        if scale != 1.0:
            flat.mul_(1 / scale)
    else:
        levels = unpack_codes(codes, _levels(bits, codes.device))[: low.numel() * group].view(-1, group)
        flat = levels.mul_(step).add_(low).view(-1)
    return flat[:count].to(dtype)


def _expanded(codes: Tensor, dtype: torch.dtype, unpack: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """The values of rows in another precision than float32, in which a stretch at a time is."""
    found: Tensor | None = None
    done = 0
    for part in torch.split(codes, max(1, STRETCH // codes.shape[1])):
        values = unpack(part)
        if scale != 1.0:
            values.mul_(1 / scale)
        if found is None:
            found = torch.empty(codes.shape[0], values.shape[1], dtype=dtype)
        found[done : done + part.shape[0]] = values
        done += part.shape[0]
    assert found is not None
    return found.view(-1)


@constant
def _levels(bits: int, device: torch.device) -> Tensor:
    return unpacking_table(torch.arange(2.0**bits, device=device), 8 // bits)
