"""Look at the next batches of a running fit and put them back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric


class _Replay:
    """Gives back what was taken, then hands the original iterator back to its owner.

    ``itertools.chain`` would call ``iter`` on Lightning's combined loader and restart it.
    """

    def __init__(self, taken: list[Any], original: Any, owner: Any) -> None:
        self._taken = taken[::-1]
        self._original = original
        self._owner = owner

    def __iter__(self) -> _Replay:
        return self

    def __next__(self) -> Any:
        if self._taken:
            return self._taken.pop()
        if self._owner.iterator is self:
            self._owner.iterator = self._original
        return next(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def peek(trainer: pl.Trainer, count: int) -> list[Any] | None:
    """The next batches of the running epoch, as the loader gave them; none is lost.

    Args:
        trainer: inside ``on_train_batch_start``.
        count: how many; fewer where the epoch ends before.

    Returns:
        The batches on the CPU, or ``None`` where this Trainer does not allow it.
    """
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    if fetcher is None or not hasattr(fetcher, "iterator") or type(fetcher).__name__ == "_DataLoaderIterDataFetcher":
        return None
    waiting = list(getattr(fetcher, "batches", []))
    taken: list[Any] = []
    try:
        while len(waiting) + len(taken) < count:
            taken.append(next(fetcher.iterator))
    except StopIteration:
        pass
    if taken:
        fetcher.iterator = _Replay(taken, fetcher.iterator, fetcher)
    return [item[0] for item in [*waiting, *taken][:count]]


def prepare(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A raw batch as ``training_step`` gets it: converted, transferred, and a copy."""
    batch = copied(batch)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def copied(batch: Any) -> Any:
    """A batch whose tensors may be edited in place without harm."""
    return apply_to_collection(batch, Tensor, torch.clone)


def run_step(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Forward pass of a training step: loss for automatic optimisation, outputs for manual.

    Manual optimisation steps inside ``training_step``, so there the module is called on the inputs alone.
    """
    with trainer.precision_plugin.train_step_context():
        if not module.automatic_optimization:
            return module(batch[0] if isinstance(batch, (list, tuple)) else batch)
        parameters = inspect.signature(module.training_step).parameters
        keywords = {"batch_idx": 0, "dataloader_idx": 0}
        extra = {key: value for key, value in keywords.items() if key in parameters}
        if not extra and len(parameters) > 1:
            return module.training_step(batch, 0)
        return module.training_step(batch, **extra)


@contextmanager
def quiet(module: pl.LightningModule) -> Iterator[None]:
    """Nothing is logged inside the block, and metrics are as before after it."""
    metrics = [(metric, _metric_state(metric)) for metric in module.modules() if isinstance(metric, Metric)]

    def ignore(*_: Any, **__: Any) -> None:
        return None

    names = ("log", "log_dict")
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    for name in names:
        module.__dict__[name] = ignore
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name)
            if name in before:
                module.__dict__[name] = before[name]
        for metric, state in metrics:
            metric.__dict__.update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    found = {name: getattr(metric, name) for name in names if name in metric.__dict__}
    return {
        name: list(value) if isinstance(value, list) else apply_to_collection(value, Tensor, torch.clone)
        for name, value in found.items()
    }
