"""Tensors that are computed again, for the backward pass, from what is kept of another one.

What a batch norm or an activation reads is kept for its own backward pass. Its output is a cheap function of that, one
pass over memory, and what the next layer keeps of it, for the gradient of its weight alone, need not be kept beside it:
convolution, batch norm, ReLU, convolution keep the input of the norm and one bit an element for the ReLU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.compression.kept import Flat, Kept, Memory, Stretch, View, Whole, dense, in_layout, storage_part
from lightning_lance.tensors import native
from lightning_lance.tensors.rounding import group_size, is_far

Bounds = tuple[float, float] | None
"""What values are clamped to; ``None``: they are not."""


class Operator:
    """One elementwise operator of a computation; holds what it needs."""

    __slots__ = ()

    def __call__(self, tensor: Tensor, own: bool) -> Tensor:
        """The result, written over the tensor if that is our own."""
        raise NotImplementedError

    def begin(self, base: Kept, bounds: Bounds, dtype: torch.dtype | None = None) -> Tensor:
        """The result, clamped, where the operator is the first one; of this dtype, where one pass makes it so."""
        value = self(base.restore(), False)
        return value if bounds is None else value.clamp_(*bounds)

    def parts(self) -> list[tuple[int, int]]:
        """What it holds in memory: identity and bytes."""
        return []


class Step:
    """What a recipe says of one operator; keeps nothing alive that a graph holds."""

    __slots__ = ()

    def operator(self) -> Operator | None:
        """The operator, as of now; ``None`` where what it needs is gone."""
        raise NotImplementedError


class Function(Operator, Step):
    """An operator without state.

    Args:
        function: the result, written over the tensor where the second argument says so.
        bounds: for one that clamps.
    """

    __slots__ = ("bounds", "function")

    def __init__(self, function: Callable[[Tensor, bool], Tensor], bounds: Bounds = None) -> None:
        self.function, self.bounds = function, bounds

    def operator(self) -> Operator:
        return self

    def __call__(self, tensor: Tensor, own: bool) -> Tensor:
        return self.function(tensor, own)

    def begin(self, base: Kept, bounds: Bounds, dtype: torch.dtype | None = None) -> Tensor:
        value = base.map(lambda levels: self.function(levels, True), None, dtype) if isinstance(base, View) else None
        if value is None:
            return super().begin(base, bounds)
        return value if bounds is None else value.clamp_(*bounds)


class Dropped(Step):
    """Dropout: a product with what it keeps."""

    __slots__ = ("noise",)

    def __init__(self, noise: Kept) -> None:
        self.noise = weakref.ref(noise)

    def operator(self) -> Operator | None:
        noise = self.noise()
        return None if noise is None else _Mask(noise)


class _Mask(Operator):
    __slots__ = ("noise",)

    def __init__(self, noise: Kept) -> None:
        self.noise = noise

    def __call__(self, tensor: Tensor, own: bool) -> Tensor:
        return tensor.mul_(self.noise.restore()) if own else tensor * self.noise.restore()

    def parts(self) -> list[tuple[int, int]]:
        return self.noise.parts()


class Normalisation(Step):
    """A normalisation of channels.

    Args:
        mean: ``(C,)``.
        invstd: ``(C,)``, one over the deviation.
        weight: ``(C,)``, or ``None``.
        bias: ``(C,)``, or ``None``.
    """

    __slots__ = ("bias", "invstd", "mean", "weight")

    def __init__(self, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.mean, self.invstd, self.weight, self.bias = mean, invstd, weight, bias

    def operator(self) -> Operator:
        # In the forward pass: an optimizer may write on the parameters before the backward pass.
        factor = self.invstd if self.weight is None else self.invstd * self.weight.detach()
        shift = self.mean * factor
        return _Affine(factor, -shift if self.bias is None else self.bias.detach() - shift)


class _Affine(Operator):
    __slots__ = ("factor", "term")

    def __init__(self, factor: Tensor, term: Tensor) -> None:
        self.factor, self.term = factor, term

    def __call__(self, tensor: Tensor, own: bool) -> Tensor:
        return affine(tensor, self.factor, self.term)

    def begin(self, base: Kept, bounds: Bounds, dtype: torch.dtype | None = None) -> Tensor:
        if isinstance(base, NormInput):
            return base.scaled(self.factor, self.term, bounds, dtype)
        return super().begin(base, bounds)

    def parts(self) -> list[tuple[int, int]]:
        return [(id(self), self.factor.nbytes + self.term.nbytes)]


class NormInput(Kept):
    """The input ``(B, C, ...)`` of a normalisation of channels.

    What is normalised is divided by its deviation: where neighbours in memory are of several channels, the range of the
    largest would drown the smaller ones. Then it is rounded after it was normalised.

    It stays whole until the next operator is known. A smooth activation has the output of the norm for its input, and
    needs it finer than the norm its own; then one copy, with twice as many bits, does for both.
    """

    __slots__ = ("_cut", "invstd", "kept", "mean", "store", "tensor")

    lends = ("backward",)

    def __init__(self, tensor: Tensor, store: Any) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.store = store
        self.mean: Tensor | None = None
        self.invstd: Tensor | None = None
        self.kept: Kept | None = None
        self._cut = False

    def is_like(self, result: Tensor) -> bool:
        """Whether the result of the norm lies in memory as the input does, without gaps."""
        tensor = self.tensor
        return (
            tensor is not None and tensor.stride() == result.stride() and tensor.dtype == result.dtype and dense(result)
        )

    def settle(self, bits: int | None = None) -> None:
        """Round it now, if it is not.

        Args:
            bits: of an element; ``None``: as many as the store gives to what has other uses than a weight's gradient.
        """
        tensor = self.tensor
        if tensor is None:
            return
        bits = self.store.bits.other if bits is None else bits
        channel = tensor.numel() // (tensor.shape[0] * tensor.shape[1])
        self._cut = not (tensor.is_contiguous() and channel % group_size(tensor.shape, tensor.stride()) == 0)
        if self._cut:
            if self.mean is None or self.invstd is None:
                axes = [axis for axis in range(tensor.dim()) if axis != 1]
                deviation, self.mean = torch.std_mean(tensor.float(), axes, correction=0)
                self.invstd = deviation.clamp_(min=torch.finfo(deviation.dtype).tiny).reciprocal_()
            kept = self.store.rounded_changed(tensor, bits, self.invstd, -self.mean * self.invstd)
        else:
            kept = self.store.rounded(tensor, bits)
        self.kept, self.tensor = Whole(kept) if isinstance(kept, Tensor) else kept, None

    def restore(self) -> Tensor:
        self.settle()
        assert self.kept is not None
        if self._cut:
            assert self.mean is not None
            assert self.invstd is not None
            return self._changed(self.invstd.reciprocal(), self.mean, None, None)
        return self.kept.restore()

    def scaled(self, factor: Tensor, term: Tensor, bounds: Bounds, dtype: torch.dtype | None = None) -> Tensor:
        """``input * factor + term`` of each channel, clamped; of this dtype, where one pass makes it so."""
        self.settle()
        assert self.kept is not None
        if self._cut:
            assert self.mean is not None
            assert self.invstd is not None
            factor, term = factor / self.invstd, term + factor * self.mean
        return self._changed(factor, term, bounds, dtype)

    def _changed(self, factor: Tensor, term: Tensor, bounds: Bounds, dtype: torch.dtype | None) -> Tensor:
        kept = self.kept
        assert kept is not None
        found = kept.changed(factor, term, bounds, dtype) if isinstance(kept, View) else None
        if found is None:
            found = affine(kept.restore(), factor, term)
            if bounds is not None:
                found.clamp_(*bounds)
        return found

    def backward(
        self, grad: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, fixed: bool, needs_input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """The backward pass of the normalisation, from the rows that it was rounded to; ``None`` where they are none.

        Args:
            grad: of the result.
            weight: ``(C,)``, or ``None``.
            mean: ``(C,)``, what was subtracted.
            invstd: ``(C,)``, what was multiplied by.
            fixed: whether both do not depend on the input.
            needs_input: whether the gradient of the input is asked for.

        Returns:
            The gradients of input, weight and bias.
        """
        self.settle()
        kept = self.kept
        rounded = kept.all_rows() if isinstance(kept, View) else None
        if rounded is None or not native.takes(grad):
            return None
        assert isinstance(kept, View)
        mean, invstd = mean.float(), invstd.float()
        change = None if self._cut else native.Affine.of(invstd, -mean * invstd, kept.stride)
        flat = in_layout(grad, kept.shape, kept.stride)
        factor = (invstd if weight is None else invstd * weight.detach().float()).contiguous()
        found = torch.empty_strided(kept.shape, kept.stride, dtype=grad.dtype, device="cpu") if needs_input else None
        sums = native.norm_backward(
            *(rounded.codes, rounded.bits, rounded.group, 1 / rounded.scale, change, max(1, kept.stride[1])),
            *(flat, factor, found, fixed),
        )
        dtype = mean.dtype if weight is None else weight.dtype
        return found, sums[1].to(dtype, copy=True), sums[0].to(dtype, copy=True)  # each in memory of its own

    def parts(self) -> list[tuple[int, int]]:
        self.settle()
        assert self.kept is not None
        found = self.kept.parts()
        if self._cut and self.mean is not None and self.invstd is not None:
            found = [*found, storage_part(self.mean), storage_part(self.invstd)]
        return found


def affine(tensor: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    """``tensor * factor + term`` of each channel, in the dtype and layout of the tensor: one pass of a fixed norm."""
    zero, one = torch.zeros_like(factor), torch.ones_like(factor)
    return torch.batch_norm(tensor, factor, term, zero, one, False, 0.0, 0.0, False)


class Computed:
    """A stretch of memory that is computed from what is kept of another."""

    __slots__ = ("__weakref__", "_flat", "base", "operators")

    def __init__(self, base: Kept, operators: list[Operator]) -> None:
        self.base, self.operators = base, operators
        self._flat: Flat | None = None

    def restore(self) -> Tensor:
        """On one axis; not computed again while its memory lives."""
        flat = None if self._flat is None else self._flat()
        if flat is None:
            flat = self._compute(None)
            self._flat = Flat(flat)
        return flat

    def halved(self) -> Tensor | None:
        """In bfloat16, on one axis; ``None`` where that is not precise enough."""
        stretch = self.base.stretch if isinstance(self.base, View) else None
        if isinstance(stretch, Stretch) and is_far(stretch.rounded):
            return None
        flat = None if self._flat is None else self._flat()
        return (self._compute(torch.bfloat16) if flat is None else flat).bfloat16()

    def _compute(self, dtype: torch.dtype | None) -> Tensor:
        with torch.no_grad():
            first, *others = self.operators
            bounds = others[0].bounds if others and isinstance(others[0], Function) else None
            value = first.begin(self.base, bounds, dtype)
            others = others if bounds is None else others[1:]
            for operator in others:
                value = operator(value, True)
            return value.as_strided((value.numel(),), (1,))

    def parts(self) -> list[tuple[int, int]]:
        """As those of a :class:`Kept`."""
        return [*self.base.parts(), *(part for operator in self.operators for part in operator.parts())]


class Recipe(NamedTuple):
    """How a tensor is computed from another one.

    Attributes:
        base: weak reference to what is kept of the other one.
        steps: the operators.
        stride: strides of both.
        offset: of the tensor in its storage.
        reference: weak reference to that storage; while it lives, no other has the same address.
        computed: weak reference to what computes it, in a list of one.
    """

    base: Any
    steps: tuple[Step, ...]
    stride: tuple[int, ...]
    offset: int
    reference: Any
    computed: list[Any]

    @property
    def is_normalisation(self) -> bool:
        """Whether a normalisation is all that there is to compute."""
        return len(self.steps) == 1 and isinstance(self.steps[0], Normalisation)


class Recipes:
    """Those of a step.

    They are found by the memory of a tensor and its version: a tensor that was written to has none.
    """

    def __init__(self) -> None:
        self._found: dict[Any, Recipe] = {}

    def find(self, tensor: object) -> Recipe | None:
        """The recipe of a tensor, or of a view of all of it."""
        return self._found.get(_key(tensor)) if self._found and type(tensor) is Tensor else None

    def add(self, tensor: Tensor, base: Kept, steps: tuple[Step, ...], computed: Memory | None = None) -> None:
        """Note how a tensor is computed; its elements fill a stretch of memory as those of the base do.

        Args:
            tensor: the result.
            base: what is kept of the tensor that it is computed from.
            steps: the operators.
            computed: what computes it, where that exists already.
        """
        key = _key(tensor)
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._found[key] = Recipe(
            weakref.ref(base),
            steps,
            tensor.stride(),
            int(tensor.storage_offset()),
            reference,
            [] if computed is None else [weakref.ref(computed)],
        )

    def extend(self, recipe: Recipe, tensor: Tensor, step: Step) -> None:
        """Note that a tensor is the result of one more operator."""
        base = recipe.base()
        if base is not None and tensor.stride() == recipe.stride:
            self.add(tensor, base, (*recipe.steps, step))

    @staticmethod
    def view(recipe: Recipe, tensor: Tensor) -> View | None:
        """A tensor as what its recipe makes; ``None`` where what it would be made of is gone."""
        base = recipe.base()
        if base is None:
            return None
        computed = recipe.computed[0]() if recipe.computed else None
        if computed is None:
            operators = [operator for step in recipe.steps if (operator := step.operator()) is not None]
            if len(operators) < len(recipe.steps):
                return None
            computed = Computed(base, operators)
            recipe.computed[:] = [weakref.ref(computed)]
        offset = (
            int(tensor.storage_offset()) - recipe.offset
            if recipe.reference.cdata == tensor.untyped_storage()._cdata
            else 0
        )
        return View(computed, tensor.shape, tensor.stride(), offset)

    def clear(self) -> None:
        """Forget them: the step is over."""
        self._found = {}


def _key(tensor: Any) -> Any:
    return (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor._version)
