"""The companions for calls that no module makes: ``F.relu(x)``, ``x.relu()``, ``F.max_pool2d(x, 2)`` in a forward.

A function mode sees every call of a torch function inside its block, and sends a few of them to the same operators
that the companion layers use. Stock modules that were not swapped call these functions too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lance.ops import activation, attention, pool, rounded_norm, smooth
from lightning_lance.ops.dropout import dropout, replaceable
from lightning_lance.ops.norm import fixed_batch_norm
from lightning_lance.ops.tracking import tracked
from lightning_lance.ops.watching import WatchingMode

Stock = Callable[..., Any]
Route = Callable[..., Any]

_EXACT: dict[Stock, Route] = {}
_APPROXIMATE: dict[Stock, Route] = {}


def _replaces(*stock: Stock, table: dict[Stock, Route] = _EXACT) -> Callable[[Route], Route]:
    """Decorator: the function, with the arguments of the stock ones, answers for them; ``NotImplemented`` declines."""

    def decorate(route: Route) -> Route:
        for function in stock:
            table[function] = route
        return route

    return decorate


class _CompactFunctional(WatchingMode):
    def __init__(self, routes: dict[Stock, Route]) -> None:
        super().__init__()
        self.routes = routes

    def __torch_function__(
        self, func: Stock, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The mode is off inside of this method: what the stock function calls is not seen.
        kwargs = kwargs or {}
        if func in self.routes and "out" not in kwargs:
            result = self.routes[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def compact_functional(approximate: bool = False) -> AbstractContextManager[Any]:
    """Context in which functional calls with a gradient keep less for backward.

    Outputs and gradients are those of the stock functions, bit for bit; without a gradient the stock functions run.
    Functions that torch.compile traces inside of the block are covered as well.

    Covered: relu, relu6, hardtanh, leaky_relu, hardsigmoid, dropout, max_pool, avg_pool and adaptive_avg_pool over
    1 to 3 axes, and batch_norm with fixed statistics and a frozen weight; also as methods, from :mod:`torch`, and in
    place.

    Args:
        approximate: also those whose gradient is not exact, as with ``companions="approximate"``: gelu, silu, mish,
            hardswish, sigmoid, tanh, batch_norm in its other cases, layer_norm, group_norm,
            scaled_dot_product_attention and multi_head_attention_forward. Their outputs are.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning_lance import measure_saved_bytes
        >>> x = torch.randn(64, requires_grad=True)
        >>> measure_saved_bytes(lambda: F.relu(x * 2)).total
        256
        >>> with compact_functional():
        ...     print(measure_saved_bytes(lambda: F.relu(x * 2)).total)
        8
    """
    return _CompactFunctional({**_EXACT, **_APPROXIMATE} if approximate else _EXACT)


@_replaces(F.relu)
def _relu(input: Tensor, inplace: bool = False) -> Any:
    return activation.relu(input, inplace) if tracked(input) else NotImplemented


@_replaces(torch.relu, Tensor.relu)
def _relu_new(input: Tensor) -> Any:
    return _relu(input)


@_replaces(torch.relu_, Tensor.relu_)
def _relu_in_place(input: Tensor) -> Any:
    return _relu(input, True)


@_replaces(F.relu6)
def _relu6(input: Tensor, inplace: bool = False) -> Any:
    return activation.relu6(input, inplace) if tracked(input) else NotImplemented


@_replaces(F.hardtanh)
def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return activation.hardtanh(input, min_val, max_val, inplace) if tracked(input) else NotImplemented


@_replaces(F.hardtanh_)
def _hardtanh_in_place(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _hardtanh(input, min_val, max_val, True)


@_replaces(F.leaky_relu)
def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return activation.leaky_relu(input, negative_slope, inplace) if tracked(input) else NotImplemented


@_replaces(F.leaky_relu_)
def _leaky_relu_in_place(input: Tensor, negative_slope: float = 0.01) -> Any:
    return _leaky_relu(input, negative_slope, True)


@_replaces(F.hardsigmoid)
def _hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    return activation.hardsigmoid(input, inplace) if tracked(input) else NotImplemented


@_replaces(F.dropout)
def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and tracked(input) and replaceable(input, p):
        return dropout(input, p, inplace)
    return NotImplemented


@_replaces(torch.dropout)
def _torch_dropout(input: Tensor, p: float, train: bool) -> Any:
    return _dropout(input, p, train)


@_replaces(torch.dropout_)
def _dropout_in_place(input: Tensor, p: float, train: bool) -> Any:
    return _dropout(input, p, train, True)


def _pooled(input: Tensor, axes: int) -> bool:
    return tracked(input) and input.dim() in (axes + 1, axes + 2)


def _max_pool(axes: int) -> Route:
    def route(
        input: Tensor,
        kernel_size: pool.Sizes,
        stride: pool.Sizes | None = None,
        padding: pool.Sizes = 0,
        dilation: pool.Sizes = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices or not _pooled(input, axes):
            return NotImplemented
        return pool.max_pool(input, pool.window(axes, kernel_size, stride, padding, dilation, ceil_mode))

    return route


def _avg_pool(axes: int) -> Route:
    def route(
        input: Tensor,
        kernel_size: pool.Sizes,
        stride: pool.Sizes | None = None,
        padding: pool.Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if not _pooled(input, axes):
            return NotImplemented
        static = pool.window(axes, kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override)
        return pool.avg_pool(input, static)

    return route


def _adaptive_avg_pool(axes: int) -> Route:
    def route(input: Tensor, output_size: Any) -> Any:
        return pool.adaptive_avg_pool(input, output_size, axes) if _pooled(input, axes) else NotImplemented

    return route


_MAX_POOL = ((F.max_pool1d, torch.max_pool1d), (F.max_pool2d, torch.max_pool2d), (F.max_pool3d, torch.max_pool3d))
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE_AVG_POOL = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
for _axes in (1, 2, 3):
    _replaces(*_MAX_POOL[_axes - 1])(_max_pool(_axes))
    _replaces(_AVG_POOL[_axes - 1])(_avg_pool(_axes))
    _replaces(_ADAPTIVE_AVG_POOL[_axes - 1])(_adaptive_avg_pool(_axes))


@_replaces(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None or not tracked(input, bias):
        return NotImplemented
    if weight is not None and weight.requires_grad:
        return NotImplemented
    return fixed_batch_norm(input, weight, bias, running_mean, running_var, eps)


@_replaces(F.batch_norm, table=_APPROXIMATE)
def _rounded_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    exact = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if exact is not NotImplemented or not tracked(input, weight, bias):
        return exact
    if not training and (running_mean is None or running_var is None):
        return NotImplemented
    if input.numel() <= input.shape[1] or eps <= 0:  # errors in training
        return NotImplemented
    return rounded_norm.rounded_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


@_replaces(F.layer_norm, table=_APPROXIMATE)
def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not tracked(input, weight, bias):
        return NotImplemented
    return rounded_norm.rounded_layer_norm(input, tuple(normalized_shape), weight, bias, eps)


@_replaces(F.group_norm, table=_APPROXIMATE)
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    if not tracked(input, weight, bias) or not rounded_norm.groupable(input, num_groups):
        return NotImplemented
    return rounded_norm.rounded_group_norm(input, num_groups, weight, bias, eps)


def _smooth(function: smooth.Smooth) -> Route:
    def route(input: Tensor, inplace: bool = False) -> Any:
        return smooth.few_bit(function, input, inplace) if tracked(input) else NotImplemented

    return route


for _function, _stock in (
    (smooth.SILU, (F.silu,)),
    (smooth.MISH, (F.mish,)),
    (smooth.HARDSWISH, (F.hardswish,)),
    (smooth.SIGMOID, (F.sigmoid, torch.sigmoid, Tensor.sigmoid)),
    (smooth.TANH, (F.tanh, torch.tanh, Tensor.tanh)),
):
    _replaces(*_stock, table=_APPROXIMATE)(_smooth(_function))


@_replaces(F.gelu, table=_APPROXIMATE)
def _gelu(input: Tensor, *, approximate: str = "none") -> Any:
    return smooth.few_bit(smooth.GELU, input, approximate=approximate) if tracked(input) else NotImplemented


_replaces(F.scaled_dot_product_attention, table=_APPROXIMATE)(attention.rounded_attention)
_replaces(F.multi_head_attention_forward, table=_APPROXIMATE)(attention.rounded_multi_head_attention)
