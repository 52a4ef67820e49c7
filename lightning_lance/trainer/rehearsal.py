"""Run the forward passes of a training step and undo everything else that it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric


class _IdleOptimizer:
    """Has the attributes of an optimiser and takes no step; a closure still runs, for its forward pass."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def zero_grad(self, *_: Any, **__: Any) -> None:
        return None

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()


class _IdleScheduler:
    """Has the attributes of a learning-rate scheduler and takes no step."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def step(self, *_: Any, **__: Any) -> None:
        return None


def _idle(found: Any, kind: Callable[[Any], Any]) -> Any:
    if found is None:
        return None
    return [kind(item) for item in found] if isinstance(found, (list, tuple)) else kind(found)


@contextmanager
def rehearsal(
    trainer: pl.Trainer, module: pl.LightningModule, forward_fn: Callable[[Any, Any], Any] | None = None
) -> Iterator[Callable[[Any], Any]]:
    """Inside the block nothing is logged, stepped or differentiated; afterwards metrics and gradients are as before.

    Covers what is not a buffer or a random state (that is
    :func:`~lightning_lance.compression.isolation.isolated`): logging, torchmetrics states, gradients and their flags and, under manual optimisation, the optimisers, schedulers and
    backward passes that ``training_step`` asks for.

    Args:
        trainer: inside ``on_train_batch_start``.
        module: its module.
        forward_fn: ``forward_fn(module, batch)`` to run in place of ``training_step``.

    Yields:
        A function from a batch to what ``training_step`` returns; under manual optimisation together with the losses
        that it would have differentiated.
    """
    losses: list[Any] = []

    def ignore(*_: Any, **__: Any) -> None:
        return None

    replaced: dict[str, Any] = {"log": ignore, "log_dict": ignore}
    if not module.automatic_optimization:
        optimizers, schedulers = module.optimizers, module.lr_schedulers
        replaced |= {
            "manual_backward": lambda loss, *_, **__: losses.append(loss),
            "clip_gradients": ignore,
            "optimizers": lambda *args, **kwargs: _idle(optimizers(*args, **kwargs), _IdleOptimizer),
            "lr_schedulers": lambda: _idle(schedulers(), _IdleScheduler),
        }

    def run(batch: Any) -> Any:
        losses.clear()
        with trainer.precision_plugin.train_step_context():
            result = _training_step(module, batch) if forward_fn is None else forward_fn(module, batch)
        return result if module.automatic_optimization else (result, list(losses))

    own = module.__dict__
    before = {name: own[name] for name in replaced if name in own}
    metrics = [(metric, _metric_state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None  # a step that is not idle then finds nothing to do
    own.update(replaced)
    try:
        yield run
    finally:
        losses.clear()
        for name in replaced:
            own.pop(name, None)
        own.update(before)
        for metric, state in metrics:
            metric.__dict__.update(state)
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _training_step(module: pl.LightningModule, batch: Any) -> Any:
    parameters = inspect.signature(module.training_step).parameters
    if "batch_idx" in parameters:
        return module.training_step(batch, batch_idx=0)
    takes_more = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return module.training_step(batch, 0) if takes_more else module.training_step(batch)


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    found = {name: getattr(metric, name) for name in names if name in metric.__dict__}
    return {
        name: list(value) if isinstance(value, list) else apply_to_collection(value, Tensor, _clone)
        for name, value in found.items()
    }


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
