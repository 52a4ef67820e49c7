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
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    training = [(module, module.training) for module in model.modules()]
    orders: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, Compressed):
            state = module._lance.order.state
            orders.append((state, state.clone()))
            break
    random_state = _random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for target, saved in [*buffers, *orders]:
                target.copy_(saved)
        for module, flag in training:
            module.training = flag
        _set_random_state(random_state)


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
