"""Forward passes on batches of a Trainer's own loader, beside the ones that are trained on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_map

from lightning_lance.errors import CalibrationError
from lightning_lance.trainer.peeking import copied, prepare

Forward = Callable[[pl.LightningModule, Any], Any]
"""``forward_fn(module, batch)``: one forward pass."""


def bare(module: pl.LightningModule, batch: Any) -> Any:
    """The network's own forward pass on the inputs of a batch, and its task labels where it takes them."""
    if isinstance(batch, dict):
        return module(batch)
    parts = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    return module(parts[0], parts[2]) if len(taken) > 1 and len(parts) > 2 else module(parts[0])


def one_pass(trainer: pl.Trainer, module: pl.LightningModule, forward: Forward, batch: Any) -> Any:
    """A forward pass in the Trainer's precision, on a copy of the batch."""
    with trainer.precision_plugin.train_step_context():
        return forward(module, copied(batch))


def passes(
    trainer: pl.Trainer, module: pl.LightningModule, forward: Forward, count: int
) -> Generator[Callable[[], Any], None, None]:
    """Forward passes on the first batches of an epoch, one batch in memory at a time.

    They are drawn from copies of the Trainer's loaders: the running epoch keeps its place. Draw them inside of
    :func:`~lightning_lance.compression.isolation.isolated`, for a new epoch draws random numbers.

    Args:
        trainer: inside of a fit.
        module: the model.
        forward: the forward pass.
        count: of batches; fewer where the epoch has fewer.

    Raises:
        CalibrationError: a loader can be read only once.
    """
    combined: Any = trainer.fit_loop._combined_loader
    with _generators(combined.flattened):
        fresh = CombinedLoader(tree_map(_copied_loader, combined.iterables), combined._mode)
        for raw, _, _ in islice(fresh, int(min(count, trainer.num_training_batches))):
            yield functools.partial(one_pass, trainer, module, forward, prepare(trainer, module, raw))


def _copied_loader(loader: Any) -> Any:
    """A loader over the same data with a place of its own; workers that persist stay with the original."""
    try:
        made = copy.copy(loader)
    except TypeError as error:
        raise CalibrationError(
            f"calibration='eval' reads batches before the first step, and a {type(loader).__name__} can be read once "
            "only. Give a DataLoader, or calibration='training'."
        ) from error
    if getattr(made, "_iterator", None) is not None:
        made._iterator = None
    return made


@contextmanager
def _generators(loaders: list[Any]) -> Iterator[None]:
    """Give the random generators of loaders and samplers their states back."""
    owners = [part for found in loaders for part in (found, *(_part(found, n) for n in ("sampler", "batch_sampler")))]
    owners += [_part(part, "sampler") for part in owners]
    found = [generator for part in owners if isinstance(generator := _part(part, "generator"), torch.Generator)]
    states = [(generator, generator.get_state()) for generator in found]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _part(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)
