"""Transforms of :mod:`torch.func`, and tracers, inside of a step: nothing is rounded in them.

Those that refuse saved-tensor hooks say so through :func:`torch.autograd.graph.disable_saved_tensors_hooks`, which
raises where hooks are on. While a store is open, ours are taken off before it is asked.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_lance.errors import LanceWarning
from lightning_lance.ops.saving import saving

_graph: Any = torch.autograd.graph
_stock: Any = torch.autograd.graph.disable_saved_tensors_hooks
_lock = threading.Lock()
_open: list[Any] = []
_told: list[bool] = []


@contextmanager
def _disable(error_message: str) -> Iterator[None]:
    store = saving.store
    if store is None:
        with _stock(error_message):
            yield
        return
    tell()
    with store.without_hooks(), _stock(error_message):
        yield


def tell() -> None:
    """Say it once."""
    if not _told:
        _told.append(True)
        warnings.warn(
            "a transform of torch.func, or a tracer of torch.fx, ran in a training step: what is saved inside of it is "
            "kept as plain training keeps it.",
            LanceWarning,
            stacklevel=5,
        )


def allow(store: Any) -> None:
    """A store is open."""
    with _lock:
        _open.append(store)
        _graph.disable_saved_tensors_hooks = _disable


def refuse(store: Any) -> None:
    """It is closed; after the last one torch has its own function back."""
    with _lock:
        _open.remove(store)
        if not _open:
            _graph.disable_saved_tensors_hooks = _stock
