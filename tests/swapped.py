"""Swapped and calibrated layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lance import LanceConfig, calibrate, swap

COMPACT_MODES = {"batch": "compact", "spatial": "compact"}
"""The ranks of ``"compact"``, asked for mode by mode: layers are projected even where that saves little."""


def ready(model: Any, *inputs: Tensor, **options: Any) -> Any:
    """Swap and calibrate in place."""
    swap(model, LanceConfig(**{"rank": "compact", **options}))
    with calibrate(model):
        for input in inputs:
            model(input)
    return model
