"""Streams of experiences through a Lightning Trainer: ``StreamRunner``, with Avalanche benchmarks as data.

Needs the extra: ``pip install 'lightning-lance[avalanche]'``.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("avalanche") is None:  # pragma: no cover
    raise ImportError(
        "lightning_lance.streams needs Avalanche, which is not installed. "
        "Install it with: pip install 'lightning-lance[avalanche]'"
    )

from lightning_lance.streams.datamodule import AvalancheDataModule
from lightning_lance.streams.module import ContinualClassifier
from lightning_lance.streams.result import StreamResult
from lightning_lance.streams.runner import StreamRunner

__all__ = ["AvalancheDataModule", "ContinualClassifier", "StreamResult", "StreamRunner"]
