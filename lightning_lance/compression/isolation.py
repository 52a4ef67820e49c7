"""Run forward passes that leave no trace: buffers, random state and training flags come back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.layers.compressed import Compressed


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Restore, on exit and on error, what forward passes in training mode change.

    Covers every buffer (running statistics, spectral norms), training flags, the random states of Python, NumPy
    and torch (CPU and the current accelerator), and the count of sample orders drawn.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    training = [(module, module.training) for module in model.modules()]
    layers = [module for module in model.modules() if isinstance(module, Compressed)]
    states = {id(layer._lance.order): layer._lance.order.state for layer in layers}
    orders = [(state, state.clone()) for state in states.values()]
    random_state = _random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer  # a forward pass may have put a new tensor in its place
                _write_back(buffer, saved)
            for state, saved in orders:
                state.copy_(saved)
        for module, flag in training:
            module.training = flag
        _set_random_state(random_state)


def _write_back(buffer: Tensor, saved: Tensor) -> None:
    # Not where nothing changed: a buffer made by expand() cannot be written to.
    if not torch.equal(buffer, saved):
        buffer.copy_(saved)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
