"""What single operators keep that their backward pass reads in part only, and which of their arguments are weights.

A function mode sees every call of a torch function, from modules and from anybody's own forward, and says to the store
what is about to be saved. The stock operator runs, and later its stock backward kernel, on a stand-in that leads to the
same gradient bit for bit: one bit for ReLU and its like and for dropout, the place in its window for a maximum, nothing
but the shape for an averaged input, for a normalisation with fixed statistics and a frozen weight, and for a frozen
convolution. Large norms, gates, pools, smooth activations and weighted operators run as functions of ours, which read
what is kept without a stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from lightning_lance.compression import transforms
from lightning_lance.compression.again import Attention, Recurrent
from lightning_lance.compression.kept import Extremes, Kept, Shape, Signs, View, Zeros, dense
from lightning_lance.compression.recipes import Bounds, Dropped, Function, Normalisation, NormInput
from lightning_lance.compression.store import STATISTICS, Store
from lightning_lance.ops.conv import Geometry
from lightning_lance.ops.gate import Gate
from lightning_lance.ops.norm import BatchNorm
from lightning_lance.ops.pool import MaxPool
from lightning_lance.ops.saving import FinishedRule, Rule, saving
from lightning_lance.ops.smooth import Smooth
from lightning_lance.ops.watching import WatchingMode
from lightning_lance.ops.weighted import Conv, Linear, has_half_products, is_usual
from lightning_lance.tensors import native, places

_RULES: dict[Any, Callable[..., Rule | None]] = {}
"""Torch function -> what makes a rule from the arguments of a call."""

LOSS_BITS = 8
"""Of log-probabilities, from which a loss's gradient comes by exponentiation."""


def _keeps(*functions: Any) -> Callable[[Callable[..., Rule | None]], Callable[..., Rule | None]]:
    """Decorator: makes the rule for calls of these functions, from the same arguments."""

    def decorate(make: Callable[..., Rule | None]) -> Callable[..., Rule | None]:
        for function in functions:
            _RULES[function] = make
        return make

    return decorate


def _always(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorator: the rule for every call of these functions."""

    def decorate(rule: Rule) -> Rule:
        for function in functions:
            _RULES[function] = lambda *_, **__: rule
        return rule

    return decorate


class Watch(WatchingMode):
    """The mode of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The mode is off inside of this method: what the stock function calls is not seen.
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or saving.store is None:
            return func(*args, **kwargs)
        make = _RULES.get(func)
        weights = False
        if torch._C._are_functorch_transforms_active():
            make = _in_transform
        elif args and self._from_weights((*args, *kwargs.values()) if kwargs else args):
            make, weights = _whole_of_weights, True
        if saving.pending is not None and func not in _SMOOTH and getattr(func, "__name__", "") != "__get__":
            self.store.settle()
        before = saving.rule, saving.arguments, saving.name
        saving.rule = rule = None if make is None else _made(make, args, kwargs)
        saving.arguments, saving.name = args, getattr(func, "__name__", "")
        run = getattr(rule, "run", None)
        try:
            result = func(*args, **kwargs) if run is None else run()
        finally:
            saving.rule, saving.arguments, saving.name = before
        if isinstance(rule, FinishedRule) and type(result) is Tensor:
            rule.finish(result, self.store)
        if weights:
            for made in result if isinstance(result, (list, tuple)) else (result,):
                self.store.derive(made)
        return result

    def _from_weights(self, args: tuple[Any, ...]) -> bool:
        """Whether all tensors among the arguments are weights."""
        first = args[0]
        if type(first) is Tensor:
            if not self.store.derived or not self.store.is_derived(first):
                return False
        elif type(first) in (list, tuple):
            if not first or not self._from_weights(first):
                return False
        elif type(first) is str:  # of an einsum
            return len(args) > 1 and self._from_weights(args[1:])
        elif type(first) is not nn.Parameter:
            return False
        return all(map(self._is_no_activation, args[1:]))

    def _is_no_activation(self, argument: Any) -> bool:
        if isinstance(argument, Tensor):
            return self.store.is_weight(argument)
        return type(argument) not in (list, tuple) or all(map(self._is_no_activation, argument))


def _in_transform(*_: Any, **__: Any) -> Rule:
    """Inside of a transform of :mod:`torch.func` tensors are wrapped, and what is saved has other axes than they."""
    transforms.tell()
    saving.store.unusual = True
    return _as_it_is


def _whole_of_weights(*_: Any, **__: Any) -> Rule:
    return _as_it_is


def _as_it_is(saved: Tensor, store: Store) -> Any:
    return saved.detach()


LARGE = 1 << 15
"""From so many elements on a backward pass of ours is worth what calling it from Python costs."""


def _reads(input: Tensor, *weights: Tensor | None) -> bool:
    """Whether an operator runs with a backward pass of ours, which reads what is kept as it is.

    Not inside of checkpointed segments, which save the same tensors again when nobody looks.
    """
    store = saving.store
    return (
        type(input) is Tensor
        and input.numel() >= LARGE
        and store.bits.other in (4, 8)
        and torch.is_grad_enabled()
        and (input.requires_grad or any(w is not None and w.requires_grad for w in weights))
        and all(w is None or type(w) in (Tensor, nn.Parameter) for w in weights)
        and native.takes(input)
        and dense(input)
        and all(w is None or unpack_dual(w).tangent is None for w in (input, *weights))  # type: ignore[no-untyped-call]
        and not torch._C._is_tracing()
        and store.is_on_top()
    )


def _made(make: Callable[..., Rule | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    try:
        return make(*args, **kwargs)
    except TypeError:  # wrong arguments; the stock function has the better message
        return None


# Activations ----------------------------------------------------------------------------------------------------------


class _Activation(FinishedRule):
    """Of an elementwise operator: its result is computed again from what its argument is computed from."""

    __slots__ = ("copied", "recipe", "rule", "run", "step")

    def __init__(
        self, input: Any, rule: Rule, function: Callable[[Tensor, bool], Tensor], bounds: Bounds = None
    ) -> None:
        self.rule, self.step = rule, Function(function, bounds)
        self.copied = False
        self.run: Callable[[], Tensor] | None = None
        self.recipe = saving.store.recipes.find(input)

    def __call__(self, saved: Tensor, store: Store) -> Any:
        return self.rule(saved, store)

    def plain(self, saved: Tensor) -> Tensor:
        """What the stock operator would save in the place of it: where it copies, other memory."""
        return torch.empty_like(saved, device="meta") if self.copied else saved

    def finish(self, result: Tensor, store: Store) -> None:
        if self.recipe is not None:
            store.recipes.extend(self.recipe, result, self.step)


_ABOVE_ZERO = (0.0, math.nan)


@_keeps(F.relu, torch.relu, Tensor.relu)
def _relu(input: Tensor, inplace: bool = False) -> Rule | None:
    return _gated(input, _positive, lambda x, own: torch.relu_(x) if own else torch.relu(x), inplace, 0.0, None)


@_keeps(torch.relu_, Tensor.relu_)
def _relu_(input: Tensor) -> Rule | None:
    return _relu(input, True)


def _gated(
    input: Tensor,
    rule: Rule,
    function: Callable[[Tensor, bool], Tensor],
    inplace: bool,
    low: float,
    high: float | None,
) -> Rule:
    made = _Activation(input, rule, function, (low, math.inf if high is None else high))
    # What is written on must be a tensor of its own, whose other views nobody needs to be told of.
    if _reads(input) and not (inplace and (input.is_leaf or input._is_view())):
        made.run = lambda: Gate.apply(input, function, inplace, low, high)
        made.copied = inplace and high is not None
    return made


def _positive(output: Tensor, store: Store) -> Any:
    return store.flags(output, Tensor.bool, 0, 1, _ABOVE_ZERO)  # positive or NaN: several times as fast as a comparison


class _Derivative:
    """Where the kernel of a backward pass, asked with a gradient of one, has a derivative other than zero.

    One pass; of torch's comparisons on the CPU each takes several times as long.
    """

    __slots__ = ("arguments", "backward", "found", "one")

    def __init__(self, backward: Any, *arguments: Any) -> None:
        self.backward, self.arguments = backward.grad_input, arguments
        self.found: Tensor | None = None

    def __call__(self, stretch: Tensor) -> Tensor:
        if self.found is None:
            self.found = torch.empty_like(stretch)
            self.one = torch.ones((), dtype=stretch.dtype, device=stretch.device)
        count = stretch.numel()
        found = self.found[:count]
        self.backward(self.one.expand(count), stretch, *self.arguments, grad_input=found)
        return found.bool()


@_keeps(F.leaky_relu, F.leaky_relu_)
def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Rule | None:
    return _Activation(input, _sign, lambda x, own: F.leaky_relu(x, negative_slope, own))


def _sign(input: Tensor, store: Store) -> Any:
    return store.flags(input, _Derivative(torch.ops.aten.leaky_relu_backward, 0.0, False), -1, 1)


@_always(F.hardsigmoid)
def _between_threes(input: Tensor, store: Store) -> Any:
    return store.flags(input, _Derivative(torch.ops.aten.hardsigmoid_backward), 4, 0)


@_keeps(F.relu6)
def _relu6(input: Tensor, inplace: bool = False) -> Rule | None:
    return _clamped(input, 0.0, 6.0, inplace)


@_keeps(F.hardtanh)
def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Rule | None:
    return _clamped(input, float(min_val), float(max_val), inplace)


@_keeps(F.hardtanh_)
def _hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Rule | None:
    return _clamped(input, float(min_val), float(max_val), True)


def _clamped(input: Tensor, low: float, high: float, inplace: bool) -> Rule | None:
    if not (math.isfinite(low) and math.isfinite(high)):
        return None

    def rule(input: Tensor, store: Store) -> Any:
        outside, inside = _stand_ins(low, high, input.dtype)
        if inside is None or not math.isfinite(outside):
            return _whole(input, store)
        return store.flags(
            input, _Derivative(torch.ops.aten.hardtanh_backward, low, high), outside, inside, (low, high)
        )

    def function(x: Tensor, own: bool) -> Tensor:
        return (F.hardtanh_ if own else F.hardtanh)(x, low, high)

    if not inplace or _is_outwards(low, high, input.dtype):
        return _gated(input, rule, function, inplace, low, high)
    return _Activation(input, rule, function, (low, high))


@cache
def _is_outwards(low: float, high: float, dtype: torch.dtype) -> bool:
    """Whether bounds are rounded outwards: clamped elements are known by the result then."""
    bounds = torch.tensor((low, high), dtype=torch.float32, device="cpu")
    below, above = (bounds.to(dtype).float() - bounds).tolist()
    return bool(below <= 0 <= above)


@cache
def _stand_ins(low: float, high: float, dtype: torch.dtype) -> tuple[float, float | None]:
    """Numbers of a dtype beyond and between bounds, with which kernels compare in float32 whatever the dtype."""
    outside, _ = _beside(low, high)
    far, *numbers = torch.tensor((outside, 0.0, 1.0, (low + high) / 2), dtype=dtype, device="cpu").tolist()
    return far, next((n for n in numbers if low < n < high), None)


@_keeps(
    *(torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_),
    *(torch.clip, torch.clip_, Tensor.clip, Tensor.clip_),
)
def _clamp(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> Rule | None:
    if any(isinstance(bound, Tensor) or (bound is not None and abs(bound) > _FAR) for bound in (min, max)):
        return _whole
    low, high = (None if bound is None else float(bound) for bound in (min, max))
    outside, inside = _beside(low, high)
    if inside is None:
        return _whole

    def within(x: Tensor) -> Tensor:
        flags = torch.ones_like(x, dtype=torch.bool) if low is None else _above(x, low)
        return flags if high is None else flags.logical_and_(_above(-x, -high))

    def rule(saved: Tensor, store: Store) -> Any:
        return store.flags(saved, within, outside, inside)

    return _Activation(input, rule, lambda x, own: x.clamp_(low, high) if own else x.clamp(low, high))


@_keeps(torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_)
def _clamp_min(input: Tensor, min: Any, **_: Any) -> Rule | None:
    return _clamp(input, min)


@_keeps(torch.clamp_max, torch.clamp_max_, Tensor.clamp_max, Tensor.clamp_max_)
def _clamp_max(input: Tensor, max: Any, **_: Any) -> Rule | None:
    return _clamp(input, None, max)


def _beside(low: float | None, high: float | None) -> tuple[float, float | None]:
    """A number beyond the bounds, and one between them that is neither; ``None`` where there is no such."""
    if low is None:
        return (0.0, 0.0) if high is None else (high + 1 + abs(high), high - 1 - abs(high))
    outside = low - 1 - abs(low)
    if high is None:
        return outside, low + 1 + abs(low)
    return outside, next((n for n in (0.0, 1.0, (low + high) / 2) if low < n < high), None)


@cache
def _at_bounds() -> bool:
    """Whether the kernel passes gradients at the bounds themselves, which versions of torch see differently."""
    with torch.inference_mode(False), torch.enable_grad():
        bound = torch.zeros((), requires_grad=True)
        return bool(torch.autograd.grad(bound.clamp(min=0), bound)[0] > 0)


def _above(tensor: Tensor, bound: float) -> Tensor:
    return tensor >= bound if _at_bounds() else tensor > bound


_FAR = 1e4
"""Bounds beyond it: half precision has no numbers on their other side."""


@_keeps(F.hardshrink, F.softshrink, Tensor.hardshrink)
def _shrink(input: Tensor, lambd: float = 0.5) -> Rule | None:
    return lambda saved, store: store.flags(saved, lambda x: x.abs() > lambd, 0, 2 * lambd + 1)


def _whole(saved: Tensor, store: Store) -> Any:
    """Keep what is compared, or divided by, as it is."""
    return store.whole(saved) if saved.is_floating_point() else NotImplemented


@_always(
    *(torch.abs, torch.abs_, Tensor.abs, Tensor.abs_, Tensor.__abs__),
    *(torch.absolute, Tensor.absolute, Tensor.absolute_),
)
def _sign_or_zero(saved: Tensor, store: Store) -> Any:
    """The kernel multiplies by the sign."""
    return Signs(saved > 0, saved < 0, saved.stride(), saved.dtype) if saved.is_floating_point() else NotImplemented


@_keeps(torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum)
def _larger(input: Tensor, other: Tensor, **_: Any) -> Rule | None:
    """The kernel asks which of the two is larger."""
    first, second = (_place(tensor) for tensor in (input, other))
    alike = input.shape == other.shape and input.dtype == other.dtype and first != second
    if (
        None in (first, second)
        or not alike
        or any(type(tensor) is not Tensor or saving.store.is_weight(tensor) for tensor in (input, other))
    ):
        return _whole

    def rule(saved: Tensor, store: Store) -> Any:
        if not saved.is_floating_point() or _place(saved) not in (first, second):
            return _whole(saved, store)
        if _place(saved) == second:
            return Zeros(saved)
        plain = other.detach()
        return Signs(saved > plain, saved < plain, saved.stride(), saved.dtype)

    return rule


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies, by which it is known again when it is saved; ``None`` inside of a transform."""
    try:
        return tensor.data_ptr(), tensor.stride(), tensor._version
    except RuntimeError:
        return None


@_keeps(torch.max, torch.min, Tensor.max, Tensor.min)
def _extreme(input: Tensor, other: Any = None, **_: Any) -> Rule | None:
    """Of two tensors, of an axis, which keeps places alone, or of all elements."""
    return _larger(input, other) if isinstance(other, Tensor) else _whole


@_keeps(torch.amax, Tensor.amax)
def _amax(input: Tensor, dim: Any = (), keepdim: bool = False, **_: Any) -> Rule | None:
    return _reduced(input, dim, torch.amax)


@_keeps(torch.amin, Tensor.amin)
def _amin(input: Tensor, dim: Any = (), keepdim: bool = False, **_: Any) -> Rule | None:
    return _reduced(input, dim, torch.amin)


def _reduced(input: Tensor, dim: Any, function: Any) -> Rule:
    """The kernel compares with the result, so that a rounded argument would have no largest element."""
    place = _place(input)

    def rule(saved: Tensor, store: Store) -> Any:
        if place is None or _place(saved) != place or not saved.is_floating_point():
            return _whole(saved, store)
        saved = saved.detach()
        return Extremes(saved, function(saved, dim, True))

    return rule


_always(
    *(torch.aminmax, Tensor.aminmax, torch.median, Tensor.median, torch.nanmedian, Tensor.nanmedian),
    *(torch.fmax, Tensor.fmax, torch.fmin, Tensor.fmin),
)(_whole)


@_keeps(torch.norm, Tensor.norm, torch.linalg.vector_norm, torch.linalg.norm, F.normalize)
def _norm(input: Tensor, p: Any = None, *_: Any, ord: Any = None, **__: Any) -> Rule | None:
    """That of an order but two takes the sign, the largest element, or a power of each."""
    order = p if ord is None else ord
    return None if order is None or order == 2 or isinstance(order, str) else _whole


# What a gradient is divided by. Of even levels the lowest one, which may be 0, would stand for all small elements, and
# one a little outside of the range of a function has no gradient.


def _relatively(saved: Tensor, store: Store) -> Any:
    return store.relatively(saved) if saved.is_floating_point() else NotImplemented


_always(
    *(torch.log, Tensor.log, torch.log2, Tensor.log2, torch.log10, Tensor.log10),
    *(torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal),
    *(Tensor.__rtruediv__, torch.atan2, Tensor.atan2, torch.hypot, Tensor.hypot),
)(_relatively)
_always(
    *(torch.log1p, Tensor.log1p, torch.logit, Tensor.logit, torch.special.logit, torch.xlogy, Tensor.xlogy),
    *(torch.special.xlogy, torch.special.xlog1py, torch.special.entr, torch.erfinv, Tensor.erfinv),
    *(torch.acos, Tensor.acos, torch.asin, Tensor.asin, torch.atanh, Tensor.atanh, torch.acosh, Tensor.acosh),
)(_whole)


@_keeps(torch.div, torch.divide, Tensor.div, Tensor.div_, Tensor.divide, Tensor.__truediv__, Tensor.__itruediv__)
def _quotient(input: Any, other: Any, **_: Any) -> Rule | None:
    place = _place(other) if isinstance(other, Tensor) else None
    if place is None or saving.store.is_weight(other):
        return None
    few = isinstance(input, Tensor) and other.numel() * STATISTICS <= input.numel()
    keep = _whole if few else _relatively
    return lambda saved, store: keep(saved, store) if _place(saved) == place else NotImplemented


@_keeps(torch.pow, Tensor.pow, Tensor.pow_, Tensor.__pow__, Tensor.__ipow__)
def _power(input: Any, exponent: Any, **_: Any) -> Rule | None:
    if isinstance(exponent, Tensor):
        return _whole
    return None if exponent >= 1 else _relatively


@_keeps(F.softmax, torch.softmax, Tensor.softmax)
def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Rule | None:
    """Of probabilities of classes the logarithm may be taken; of attention, on the last axis of more than two, not."""
    return None if input.dim() > 2 and dim in (-1, input.dim() - 1) else _relatively


def _phase(saved: Tensor, store: Store) -> Any:
    """Angles, by the turn: far from zero a few levels for all of them would be turns apart."""
    if not saved.is_floating_point() or store.bits.other is None:
        return NotImplemented
    turns = torch.remainder(saved.detach() + math.pi, 2 * math.pi).sub_(math.pi)
    return store.rounded(turns, store.finer)


_always(torch.sin, Tensor.sin, torch.sin_, Tensor.sin_, torch.cos, Tensor.cos, torch.cos_, Tensor.cos_)(_phase)


@_keeps(F.grid_sample)
def _grid_sample(input: Tensor, grid: Tensor, *_: Any, **__: Any) -> Rule | None:
    """A coordinate says which pixels are read."""
    place = _place(grid)
    return lambda saved, store: _whole(saved, store) if _place(saved) == place else NotImplemented


class _Smooth(FinishedRule):
    """Of an elementwise operator that reads its argument in the backward pass.

    Behind a normalisation that is computed from the input of the norm, which then has more bits; and the result is
    computed from the argument.
    """

    __slots__ = ("kept", "recipe", "run", "step")

    def __init__(
        self,
        input: Any,
        function: Callable[[Tensor], Tensor],
        kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.step = Function(lambda x, _: function(x))
        self.run: Callable[[], Tensor] | None = None
        self.kept: Any = None
        recipe = saving.store.recipes.find(input)
        pending = saving.pending
        if pending is not None and recipe is not None and recipe.base() is pending:
            pending.settle(saving.store.finer)
        saving.store.settle()
        self.recipe = recipe if recipe is not None and recipe.is_normalisation else None
        if self.recipe is None and kernel is not None and saving.store.bits.other == 4 and _reads(input):
            self.run = lambda: Smooth.apply(input, function, kernel)

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if not saved.is_floating_point() or store.bits.other is None:
            return NotImplemented
        if self.recipe is not None:
            self.kept = store.recipes.view(self.recipe, saved)
        if self.kept is None:
            self.recipe = None
            self.kept = store.rounded(saved, store.bits.other)
        return self.kept

    def finish(self, result: Tensor, store: Store) -> None:
        if self.recipe is not None:
            store.recipes.extend(self.recipe, result, self.step)
        elif isinstance(self.kept, View) and self.kept.stride == result.stride() and dense(result):
            store.recipes.add(result, self.kept, (self.step,))


@_keeps(F.silu)
def _silu(input: Tensor, inplace: bool = False) -> Rule | None:
    return _Smooth(input, F.silu, None if inplace else torch.ops.aten.silu_backward)


@_keeps(F.hardswish)
def _hardswish(input: Tensor, inplace: bool = False) -> Rule | None:
    return _Smooth(input, F.hardswish)  # its kernel stops gradients that are not finite, and no product does


@_keeps(F.mish)
def _mish(input: Tensor, inplace: bool = False) -> Rule | None:
    return _Smooth(input, F.mish, None if inplace else torch.ops.aten.mish_backward)


@_keeps(F.gelu)
def _gelu(input: Tensor, approximate: str = "none") -> Rule | None:
    function, kernel = (partial(f, approximate=approximate) for f in (F.gelu, torch.ops.aten.gelu_backward))
    return _Smooth(input, function, kernel)


_SMOOTH = (F.silu, F.hardswish, F.mish, F.gelu)


@_keeps(F.dropout, torch.dropout, torch.dropout_)
def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Rule | None:
    return _Dropout(input, p)


class _Dropout(FinishedRule):
    """Keeps one bit an element; the result is computed again as that of an activation is."""

    __slots__ = ("kept", "p", "recipe")

    def __init__(self, input: Tensor, p: float) -> None:
        self.p = p
        self.kept: Any = None
        self.recipe = saving.store.recipes.find(input)

    def __call__(self, noise: Tensor, store: Store) -> Any:
        if not noise.is_floating_point():
            return NotImplemented
        # The stock operator divides ones by 1 - p in the dtype of the input.
        on = float(torch.ones((), dtype=noise.dtype).div_(1 - self.p))
        self.kept = store.flags(noise, Tensor.bool, 0, on, _ABOVE_ZERO)
        return self.kept

    def finish(self, result: Tensor, store: Store) -> None:
        if self.recipe is not None and isinstance(self.kept, Kept):
            store.recipes.extend(self.recipe, result, Dropped(self.kept))


# Pooling --------------------------------------------------------------------------------------------------------------


def _max_pool(axes: int) -> Callable[..., Rule | None]:
    def make(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Rule | None:
        if not isinstance(input, Tensor):
            return None  # type: ignore[unreachable]
        sizes = tuple(input.shape[-axes:])
        window = places.window(axes, kernel_size, stride, padding, dilation)
        found = _MaxPool(*((1, *sizes), window.with_axis()) if axes == 1 else (sizes, window))
        # The stock operator adds an axis to one; of one or three axes it has the backward pass. It refuses booleans.
        given = (kernel_size, stride, padding, dilation)
        odd = type(ceil_mode) is not bool or any(type(n) is bool for ns in given for n in _listed(ns))
        if axes == 2 and not odd and not return_indices and input.is_contiguous() and _reads(input):
            found.run = lambda: MaxPool.apply(input, window, ceil_mode)
            found.shape = lambda: (*input.shape[:-2], *places.out_sizes(sizes, window, ceil_mode))
        return found

    return make


def _listed(numbers: Any) -> list[Any]:
    return list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]


class _MaxPool:
    __slots__ = ("run", "shape", "sizes", "window")

    def __init__(self, sizes: tuple[int, ...], window: places.Window) -> None:
        self.sizes, self.window = sizes, window
        self.run: Callable[[], Tensor] | None = None
        self.shape: Callable[[], tuple[int, ...]] = tuple

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if saved.is_floating_point():
            return Shape(saved)
        return saved.detach() if self.run else Places(saved, self.sizes, self.window)

    def plain(self, saved: Tensor) -> Tensor:
        """What the stock operator would save in the place of it."""
        if saved.is_floating_point() or not self.run:
            return saved
        return torch.empty(self.shape(), dtype=torch.int64, device="meta")


class Places(Kept):
    """Indices of maxima, as places in their windows."""

    __slots__ = ("codes", "shape", "sizes", "stride", "window")

    def __init__(self, index: Tensor, sizes: tuple[int, ...], window: places.Window) -> None:
        self.shape, self.stride = index.shape, index.stride()
        self.sizes, self.window = sizes, window
        self.codes = places.pack(index, sizes, window)

    def restore(self) -> Tensor:
        return places.unpack(self.codes, self.shape, self.stride, self.sizes, self.window)

    def parts(self) -> list[tuple[int, int]]:
        return [(id(self), self.codes.nbytes)]


_MAX_POOL = ((F.max_pool1d, torch.max_pool1d), (F.max_pool2d, torch.max_pool2d), (F.max_pool3d, torch.max_pool3d))
for _axes, _functions in enumerate(_MAX_POOL, start=1):
    _keeps(*_functions)(_max_pool(_axes))


@_always(
    F.pad,  # by reflection or replication
    torch.gather,
    Tensor.gather,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)
def _shape_only(input: Tensor, store: Store) -> Any:
    return Shape(input) if input.is_floating_point() else NotImplemented


@_always(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def _shape_and_indices(saved: Tensor, store: Store) -> Any:
    return Shape(saved) if saved.is_floating_point() else NotImplemented


# Weights --------------------------------------------------------------------------------------------------------------


class _WithWeight:
    """Of an operator that multiplies an input by a weight: the input is kept for the weight's gradient alone."""

    __slots__ = ("copied", "run", "weight")

    for_weight = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.copied = False
        self.run: Callable[[], Tensor] | None = None

    def plain(self, saved: Tensor) -> Tensor:
        """What the stock operator would save in the place of it: where it copies, other memory."""
        alike = saved.untyped_storage()._cdata == self.weight.untyped_storage()._cdata
        return torch.empty_like(saved, device="meta") if self.copied and not alike else saved

    def __call__(self, saved: Tensor, store: Store) -> Any:
        weight = self.weight
        if saved.untyped_storage()._cdata == weight.untyped_storage()._cdata:
            return saved
        if saved.dtype != weight.dtype and saved.shape in (weight.shape, weight.shape[::-1]):
            return store.whole(saved)  # cast by autocast
        if not saved.is_floating_point():
            return NotImplemented
        if not weight.requires_grad:
            return Shape(saved)  # a convolution saves it all the same
        return store.for_weight(saved)


MULTIPLICATIONS = 1 << 25
"""From so many on, for the gradient of a weight, half precision is worth what calling it from Python costs."""


def _halves(input: Tensor, weight: Tensor, bias: Tensor | None, positions: int) -> bool:
    """Whether the gradient of a weight, which works at so many positions, is a product in half precision."""
    return (
        positions * weight.numel() >= MULTIPLICATIONS
        and saving.store.bits.weight in (2, 4)
        and has_half_products()
        and input.dtype is weight.dtype is torch.float32
        and weight.requires_grad
        and weight.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and _reads(input, weight, bias)
    )


def _with_weight(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> _WithWeight | None:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
    return _WithWeight(weight) if plain else None


_keeps(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)(_with_weight)


@_keeps(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Rule | None:
    rule = _with_weight(input, weight)
    fits = input.dim() > 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]
    few = bias is None or bias.dim() == 1
    if rule is not None and fits and few and _halves(input, weight, bias, math.prod(input.shape[:-1])):
        rule.run = lambda: Linear.apply(input, weight, bias)
        rule.copied = not _has_rows(input)
    return rule


def _has_rows(input: Tensor) -> bool:
    """Whether the axes before the last one are one axis without a copy."""
    try:
        input.view(-1, input.shape[-1])
    except RuntimeError:
        return False
    return True


def _conv(axes: int) -> Callable[..., Rule | None]:
    def make(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Rule | None:
        rule = _with_weight(input, weight)
        if rule is None or isinstance(padding, str) or not weight.dim() == input.dim() == axes + 2:
            return rule
        window = places.window(axes, weight.shape[2:], stride, padding, dilation)
        if _listed(stride) == [] or any(len(numbers) != axes for numbers in window) or min(window.stride) < 1:
            return rule  # the stock operator has the better message
        positions = input.shape[0] * math.prod(
            size // step for size, step in zip(input.shape[2:], window.stride, strict=True)
        )
        geometry = Geometry(*window, groups)
        if is_usual(geometry, tuple(input.shape[2:])) and _halves(input, weight, bias, positions):
            rule.run = lambda: Conv.apply(input, weight, bias, geometry)
        return rule

    return make


for _axes, _function in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1):
    _keeps(_function)(_conv(_axes))


@_keeps(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _product(input: Tensor, other: Tensor, *_: Any, **__: Any) -> Rule | None:
    def rule(saved: Tensor, store: Store) -> Any:
        if store.is_weight(other) and saved.is_floating_point():
            return _WithWeight(other)(saved, store)
        return NotImplemented

    return rule


@_keeps(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def _factors(input: Any, other: Any, *_: Any, **__: Any) -> Rule | None:
    """The smaller factor of a product, such as a gate of each channel, is little to keep, and scales all the rest."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or input.numel() == other.numel():
        return None
    least = min(input.numel(), other.numel())
    return lambda saved, store: store.whole(saved) if saved.numel() == least else NotImplemented


# Computed again -------------------------------------------------------------------------------------------------------


@_keeps(F.scaled_dot_product_attention)
def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Rule:
    return Attention(attn_mask)


@_keeps(F.multi_head_attention_forward)
def _attention_of_heads(*given: Any, key_padding_mask: Any = None, attn_mask: Any = None, **_: Any) -> Rule:
    return Attention(unknown=len(given) > 14 or key_padding_mask is not None or attn_mask is not None)


@_keeps(torch.lstm)
def _lstm(input: Tensor, *_: Any, **__: Any) -> Rule:
    return Recurrent(input)


# Norms and losses -----------------------------------------------------------------------------------------------------


@_keeps(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Rule | None:
    rule = _BatchNorm(running_mean, running_var, weight, bias, training, eps)
    if (
        not rule.fixed
        and eps > 0
        and input.dim() > 1
        and input.numel() > input.shape[1]
        and (training or (running_mean is not None and running_var is not None))
        and all(v is None or v.shape == (input.shape[1],) for v in (running_mean, running_var, weight, bias))
        and not any(v is not None and v.requires_grad for v in (running_mean, running_var))
        and _reads(input, weight, bias)
    ):
        statistics = rule.statistics  # not the rule: a circle would keep the input
        rule.run = lambda: BatchNorm.apply(
            input, weight, bias, running_mean, running_var, training, momentum, eps, statistics
        )
    return rule


class _BatchNorm(FinishedRule):
    __slots__ = ("bias", "eps", "fixed", "input", "mean", "run", "statistics", "var", "weight")

    def __init__(
        self,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        eps: float,
    ) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        self.mean, self.var = (None, None) if training else (mean, var)
        self.input: Any = None
        self.fixed = self.mean is not None and (weight is None or not weight.requires_grad)
        self.run: Callable[[], Tensor] | None = None
        self.statistics: list[Tensor] = []

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if saved.dim() == 1:  # statistics
            return store.whole(saved)
        if self.fixed:
            return Shape(saved)
        self.input = store.norm_input(saved)
        return self.input

    def finish(self, result: Tensor, store: Store) -> None:
        norm = self.input
        if not isinstance(norm, NormInput):
            return
        if self.statistics:
            norm.mean, norm.invstd = self.statistics
        elif self.mean is not None and self.var is not None:
            norm.mean, norm.invstd = self.mean.float(), (self.var.float() + self.eps).rsqrt()
        else:
            saving.looking = True
            try:
                norm.mean = getattr(result.grad_fn, "_saved_result1", None)
                norm.invstd = getattr(result.grad_fn, "_saved_result2", None)
            finally:
                saving.looking = False
        saving.pending = norm
        if norm.mean is not None and norm.invstd is not None and norm.is_like(result):
            store.recipes.add(result, norm, (Normalisation(norm.mean, norm.invstd, self.weight, self.bias),))


@_always(
    F.binary_cross_entropy,
    torch.cdist,
    torch.dist,
    Tensor.dist,
    F.hinge_embedding_loss,
    F.margin_ranking_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.pairwise_distance,
    F.soft_margin_loss,
    F.triplet_margin_loss,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
    F.gaussian_nll_loss,
    F.poisson_nll_loss,
    F.ctc_loss,
)
def _difference(saved: Tensor, store: Store) -> Any:
    """Prediction and target: the gradient is their difference, which rounding would drown."""
    return store.whole(saved) if saved.is_floating_point() else NotImplemented


@_always(F.cross_entropy, F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def _log_probabilities(saved: Tensor, store: Store) -> Any:
    if not saved.is_floating_point():
        return NotImplemented
    return store.rounded(saved, None if store.bits.other is None else LOSS_BITS)
