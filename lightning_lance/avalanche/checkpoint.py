"""Save and resume an Avalanche strategy between two experiences.

Avalanche 0.6 writes its strategies with dill, which pickles classes by value where it cannot find them by name.
``torch.optim`` deletes the names of its submodules, so that the optimiser's class is one of them, and recent versions
of ``typing_extensions`` then make it fail. The functions here put the names back while Avalanche works.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from avalanche import checkpointing as stock

from lightning_lance.tensors.files import written_aside

T = TypeVar("T")


@contextlib.contextmanager
def _importable_optimizers() -> Iterator[None]:
    prefix = torch.optim.__name__ + "."
    absent = {
        name.removeprefix(prefix): module
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    absent = {name: module for name, module in absent.items() if not hasattr(torch.optim, name)}
    for name, module in absent.items():
        setattr(torch.optim, name, module)
    try:
        yield
    finally:
        for name in absent:
            delattr(torch.optim, name)


def save_checkpoint(strategy: Any, fname: Any, exclude: Collection[str] | None = None) -> None:
    """Write a strategy, with its model, optimiser, plugins, metrics and random states, between two experiences.

    A path is replaced at once when the file is whole, so that an interrupted run leaves the earlier one.

    Args:
        strategy: any Avalanche strategy.
        fname: a path, or a writable binary file.
        exclude: attributes of the strategy to leave out.
    """
    if not isinstance(fname, (str, os.PathLike)):
        with _importable_optimizers():
            stock.save_checkpoint(strategy, fname, exclude)
        return
    with written_aside(os.fspath(fname)) as aside, _importable_optimizers():
        stock.save_checkpoint(strategy, os.fspath(aside), exclude)


def maybe_load_checkpoint(
    strategy: T, fname: Any, map_location: Any = None, unique_objects: Any = None
) -> tuple[T, int]:
    """Resume a strategy where :func:`save_checkpoint` left it; a missing file leaves it as it is.

    The file is unpickled, which runs code: load only what you trust.

    Args:
        strategy: a strategy made as for the run that was saved.
        fname: a path, or a readable binary file.
        map_location: device for the tensors, see :func:`torch.load`.
        unique_objects: objects not to be read again, such as the benchmark with its data sets.

    Returns:
        The strategy, and the index of the experience to go on with.

    Example::

        strategy, first = maybe_load_checkpoint(strategy, "stream.pt", unique_objects=benchmark)
        for experience in benchmark.train_stream[first:]:
            strategy.train(experience)
            save_checkpoint(strategy, "stream.pt")
    """
    with _importable_optimizers():
        loaded: tuple[T, int] = stock.maybe_load_checkpoint(strategy, fname, map_location, unique_objects)
    return loaded
