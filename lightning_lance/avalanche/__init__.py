"""Avalanche streams without forgetting: ``LanceStrategy``, or ``LancePlugin`` in any other strategy.

Needs the extra: ``pip install 'lightning-lance[avalanche]'``.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("avalanche") is None:  # pragma: no cover
    raise ImportError(
        "lightning_lance.avalanche needs Avalanche, which is not installed. "
        "Install it with: pip install 'lightning-lance[avalanche]'"
    )

from lightning_lance.avalanche.checkpoint import maybe_load_checkpoint, save_checkpoint
from lightning_lance.avalanche.plugin import LancePlugin
from lightning_lance.avalanche.strategy import LanceStrategy

__all__ = ["LancePlugin", "LanceStrategy", "maybe_load_checkpoint", "save_checkpoint"]
