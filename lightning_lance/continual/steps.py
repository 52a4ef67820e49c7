"""What the steps of optimisers do to reserved weights, and hooks that see each of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_lance.continual.layers import Reserved


def steps_are_sums(optimizers: Iterable[torch.optim.Optimizer], weight: Tensor) -> bool:
    """Whether every step on a weight, from now on, is a sum of its gradients times numbers, and nothing else.

    So are those of gradient descent, with momentum too, but not with weight decay, nor with momentum from before.
    """
    found = False
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(weight is held for held in group["params"]):
                momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
                if not is_sum(optimizer, group) or momentum is not None:
                    return False
                found = True
    return found


def steps_are_known(optimizers: Iterable[torch.optim.Optimizer], weight: Tensor) -> bool:
    """Whether a weight is moved by optimisers of torch alone, which do so in ``step()`` and nowhere else."""
    holding = [
        optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(weight is held for held in group["params"])
    ]
    return bool(holding) and all(map(is_known, holding))


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is one of :mod:`torch.optim`."""
    return type(optimizer).__module__.startswith("torch.optim.")


def is_sum(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the next step on a group's parameters is a sum of their gradients, as far as its kind tells."""
    return type(optimizer) is torch.optim.SGD and not group["weight_decay"]


def watch_steps(layers: Sequence[Reserved], optimizers: Iterable[Any]) -> list[Any]:
    """Let reservations see every step of any torch optimiser on their weights, right before and after it.

    Args:
        layers: held weakly.
        optimizers: those that are known to train them; others are seen too.

    Returns:
        Handles to remove.
    """
    if not layers:
        return []
    found = [weakref.ref(layer) for layer in layers]
    told = [optimizer for optimizer in optimizers if isinstance(optimizer, torch.optim.Optimizer)]
    known = {id(optimizer) for optimizer in told}

    def of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Reserved, bool]]:
        # Looked up anew: whoever loads with assign=True exchanges a parameter.
        layers = {id(layer.weight): layer for reference in found if (layer := reference()) is not None}
        for group in optimizer.param_groups if layers else ():
            for parameter in group["params"]:
                if id(parameter) in layers:
                    yield layers[id(parameter)], is_sum(optimizer, group)

    def look(optimizer: torch.optim.Optimizer) -> None:
        for layer, sums in of(optimizer):
            momentum = optimizer.state.get(layer.weight, {}).get("momentum_buffer") if sums else None
            layer.reservation.before_step(layer.weight, sums, momentum)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        for layer, _sums in of(optimizer):
            layer.reservation.watch(layer.weight)
            layer.reservation.begin_step(id(optimizer))
        named = "closure" in kwargs
        closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
        if closure is None or not is_known(optimizer):  # what others are called with is their own affair
            look(optimizer)
            return None

        def computed(*arguments: Any, **options: Any) -> Any:
            loss = closure(*arguments, **options)
            look(optimizer)  # gradients are there, and the activations no longer
            return loss

        return (args, {**kwargs, "closure": computed}) if named else ((args[0], computed, *args[2:]), kwargs)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for layer, _sums in of(optimizer):
            layer.reservation.end_step(id(optimizer), layer.weight)

    def before_others(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return None if id(optimizer) in known else before(optimizer, args, kwargs)

    # Of those that are known after their own hooks, which may change gradients; of others with what is everybody's.
    handles = [optimizer.register_step_pre_hook(before) for optimizer in told]
    return [*handles, register_optimizer_step_pre_hook(before_others), register_optimizer_step_post_hook(after)]
