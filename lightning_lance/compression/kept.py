"""What stands in the graph for a tensor that autograd saves: it, a rounded one, or the part of it that is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.tensors import native
from lightning_lance.tensors.bits import expand_bits, pack_bits
from lightning_lance.tensors.rounding import Rounded, expand, expand_changed, is_far, map_elements


class Kept:
    """Stands in the graph for a saved tensor; alive as long as autograd keeps it."""

    __slots__ = ("__weakref__",)

    lends: tuple[str, ...] = ()
    """The methods by which backward passes of ours read it as it is."""

    def restore(self) -> Tensor:
        """The tensor, or what the backward kernel takes for it."""
        raise NotImplementedError

    def parts(self) -> list[tuple[int, int]]:
        """What holds memory: what identifies it, since it may be shared, and its bytes."""
        raise NotImplementedError


class Whole(Kept):
    """A tensor as it is."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def restore(self) -> Tensor:
        return self.tensor

    def parts(self) -> list[tuple[int, int]]:
        return [storage_part(self.tensor)]


class Flat:
    """A tensor of one axis, held weakly: it is there as long as anybody holds its memory, a view of it included."""

    __slots__ = ("_offset", "_reference", "_size", "dtype")

    def __init__(self, tensor: Tensor) -> None:
        self._reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._offset, self._size, self.dtype = int(tensor.storage_offset()), tensor.numel(), tensor.dtype

    def __call__(self) -> Tensor | None:
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._reference.cdata)
        if storage is None:
            return None
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self._offset, (self._size,), (1,))


@dataclass(eq=False)
class Stretch:
    """A stretch of memory, rounded once for all who save it."""

    rounded: Rounded
    bits: int
    dtype: torch.dtype
    reference: Any  # weak; while it lives, no other storage has the same address
    _flat: Flat | None = None

    def restore(self) -> Tensor:
        """What was rounded, on one axis; not expanded again while its memory lives."""
        flat = None if self._flat is None else self._flat()
        if flat is None:
            flat = expand(self.rounded, self.dtype)
            self._flat = Flat(flat)
        return flat

    def halved(self) -> Tensor | None:
        """What was rounded in bfloat16, on one axis; ``None`` where that is not precise enough."""
        if is_far(self.rounded):
            return None
        flat = None if self._flat is None else self._flat()
        return expand(self.rounded, torch.bfloat16) if flat is None else flat.bfloat16()

    def changed(
        self, affine: native.Affine, bounds: tuple[float, float] | None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """All of it, changed by channel and clamped, on one axis; ``None`` where that is no single pass."""
        if self._flat is not None and self._flat() is not None:
            return None
        return expand_changed(self.rounded, dtype or self.dtype, affine, bounds)

    def parts(self) -> list[tuple[int, int]]:
        """As those of a :class:`Kept`."""
        return [(id(self), self.rounded.nbytes)]


class Memory(Protocol):
    """What a stretch of memory was rounded to, or computed from."""

    def restore(self) -> Tensor: ...

    def halved(self) -> Tensor | None: ...

    def parts(self) -> list[tuple[int, int]]: ...


@dataclass(eq=False)
class View(Kept):
    """A tensor in a stretch of memory."""

    __slots__ = ("offset", "shape", "stretch", "stride")

    stretch: Memory
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    lends = ("map", "halved")

    def restore(self) -> Tensor:
        return self.stretch.restore().as_strided(self.shape, self.stride, self.offset)

    def halved(self) -> Tensor | None:
        """The tensor in bfloat16; ``None`` where that is not precise enough."""
        flat = self.stretch.halved()
        return None if flat is None else flat.as_strided(self.shape, self.stride, self.offset)

    def changed(
        self, factor: Tensor, term: Tensor, bounds: tuple[float, float] | None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """``x * factor[c] + term[c]`` of each channel, clamped; ``None`` where that is no single pass."""
        stretch = self._all()
        flat = None if stretch is None else stretch.changed(native.Affine.of(factor, term, self.stride), bounds, dtype)
        return None if flat is None else flat.as_strided(self.shape, self.stride)

    def map(
        self,
        function: Callable[[Tensor], Tensor],
        gradient: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """An elementwise function of it, times a gradient; ``None`` where that takes as long as of each element."""
        rounded = self.all_rows()
        if rounded is None or rounded.bits != 4 or (gradient is not None and not native.takes(gradient)):
            return None
        assert isinstance(self.stretch, Stretch)
        made = dtype or self.stretch.dtype if gradient is None else gradient.dtype
        found = torch.empty_strided(self.shape, self.stride, dtype=made, device=rounded.codes.device)
        flat = None if gradient is None else in_layout(gradient, self.shape, self.stride)
        return found if map_elements(rounded, function, found, flat) else None

    def all_rows(self) -> Rounded | None:
        """What the tensor was rounded to, where that is all of it and rows of a pass in C."""
        stretch = self._all()
        rounded = None if stretch is None else stretch.rounded
        if rounded is None or rounded.low is not None or rounded.group > native.LONGEST or rounded.bits == 16:
            return None
        return rounded

    def _all(self) -> Stretch | None:
        """The stretch that was rounded, where the tensor is all of it."""
        stretch = self.stretch
        if not isinstance(stretch, Stretch) or self.offset or self.shape.numel() != stretch.rounded.elements:
            return None
        return stretch if fills(self.shape, self.stride) else None  # an expanded one has elements several times

    def parts(self) -> list[tuple[int, int]]:
        return self.stretch.parts()


class Flags(Kept):
    """One bit an element, and the two values that stand for it in the backward kernel.

    Args:
        bits: of what lies in memory as ``like`` does, without gaps.
        like: of the shape, strides and dtype of the tensor; other strides where that has gaps.
        own_stride: strides of the tensor.
        off: value where a bit is not set.
        on: value where it is.
    """

    __slots__ = ("bits", "dtype", "off", "on", "own_stride", "reference", "shape", "stride", "whole")

    lends: tuple[str, ...] = ("gate",)

    def __init__(self, bits: Tensor, like: Tensor, own_stride: tuple[int, ...], off: float, on: float) -> None:
        self.shape, self.stride, self.own_stride, self.dtype = like.shape, like.stride(), own_stride, like.dtype
        self.bits: Tensor | None = bits
        self.off, self.on = off, on
        self.whole: Tensor | None = None
        self.reference: Any = None  # weak; while it lives, no other storage has the same address

    def restore(self) -> Tensor:
        if self.bits is None:
            assert self.whole is not None
            return self.whole.as_strided(self.shape, self.own_stride)
        return expand_bits(self.bits, self.shape, self.stride, self.off, self.on, self.dtype)

    def gate(self, grad: Tensor) -> Tensor | None:
        """A gradient of the shape of the tensor where a flag is set, zero elsewhere; ``None`` if there is no pass."""
        if self.bits is None or self.stride != self.own_stride or not native.gates(grad) or grad.dtype != self.dtype:
            return None
        flat = in_layout(grad, self.shape, self.stride)
        found = torch.empty_strided(self.shape, self.stride, dtype=grad.dtype, device="cpu")
        native.gate(self.bits, flat, found)
        return found

    def parts(self) -> list[tuple[int, int]]:
        if self.bits is not None:
            return [(id(self), self.bits.nbytes)]
        assert self.whole is not None
        return [storage_part(self.whole)]

    def read_from(self, whole: Tensor) -> None:
        """Another operator keeps the tensor itself: no flags are needed beside it."""
        self.bits, self.whole = None, whole


class Booleans(Flags):
    """A tensor of booleans."""

    __slots__ = ()

    lends: tuple[str, ...] = ()

    def __init__(self, tensor: Tensor, own_stride: tuple[int, ...]) -> None:
        super().__init__(pack_bits(tensor), tensor, own_stride, 0, 1)

    def restore(self) -> Tensor:
        assert self.bits is not None
        return expand_bits(self.bits, self.shape, self.stride, 0, 1, torch.bool)


class Signs(Kept):
    """-1, 0 or 1 for an element: two bits."""

    __slots__ = ("dtype", "negative", "positive")

    def __init__(self, positive: Tensor, negative: Tensor, own_stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.positive, self.negative = (Booleans(found, own_stride) for found in (positive, negative))
        self.dtype = dtype

    def restore(self) -> Tensor:
        positive, negative = (found.restore().to(self.dtype) for found in (self.positive, self.negative))
        return positive.sub_(negative)

    def parts(self) -> list[tuple[int, int]]:
        return [*self.positive.parts(), *self.negative.parts()]


class Zeros(Kept):
    """Zeros in the place of a tensor."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def restore(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def parts(self) -> list[tuple[int, int]]:
        return []


class Extremes(Kept):
    """A tensor of which the largest or smallest elements alone are read: their places, and their values.

    Args:
        tensor: the tensor.
        extreme: those values, of a shape that goes with it.
    """

    __slots__ = ("extreme", "flags")

    def __init__(self, tensor: Tensor, extreme: Tensor) -> None:
        self.extreme = extreme
        self.flags = Booleans(tensor == extreme, tensor.stride())

    def restore(self) -> Tensor:
        return torch.where(self.flags.restore(), self.extreme, torch.nan)

    def parts(self) -> list[tuple[int, int]]:
        return [*self.flags.parts(), storage_part(self.extreme)]


class Shape(Kept):
    """A tensor whose shape and strides alone are read."""

    __slots__ = ("device", "dtype", "shape", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def restore(self) -> Tensor:
        # Untouched memory; on the CPU none of it is resident.
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def parts(self) -> list[tuple[int, int]]:
        return []


def storage_part(tensor: Tensor) -> tuple[int, int]:
    """What identifies the memory of a tensor, and its bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def in_layout(tensor: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The elements of a tensor of this shape in the memory order of these strides without gaps, on one axis."""
    if tensor.stride() != stride:
        tensor = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory once, in any order of the axes."""
    return fills(tensor.shape, tensor.stride())


@functools.lru_cache(maxsize=1024)
def fills(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """The same of these sizes and strides."""
    expected = 1
    for step, size in sorted((n, size) for n, size in zip(stride, shape, strict=True) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True
