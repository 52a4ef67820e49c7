"""Decorators of backward passes that are written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lance.errors import LanceError

Backward = Callable[..., Any]


def first_order_only(backward: Backward) -> Backward:
    """Decorator of a backward pass that reads saved tensors: raises where a graph of it is asked for.

    :func:`~torch.autograd.function.once_differentiable` alone raises where the incoming gradient requires grad and the
    graph is walked to its end only: :func:`torch.autograd.grad` with respect to something else would silently miss what
    goes through the saved tensors.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LanceError(
                "a backward pass with create_graph=True reached a layer that keeps less than its input, from which no "
                "second derivative can be computed. Allowed: first derivatives. Leave this layer out (layers=...), or "
                "call restore(model) before second derivatives are needed."
            )
        return once(ctx, *grads)

    return checked


def outside_autocast(backward: Backward) -> Backward:
    """Decorator of a backward pass that casts its operands itself, for a call of ``backward()`` under autocast.

    Autocast would give the operations in it dtypes of its own, and some of them, such as padding by reflection,
    another one than their neighbours.
    """

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        if not torch.is_autocast_enabled(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run
