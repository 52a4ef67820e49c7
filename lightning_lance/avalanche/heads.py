"""Which modules of an Avalanche model are heads."""

from __future__ import annotations

from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from torch import nn


def find_heads(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the classifiers that Avalanche adapts to each experience.

    Returns:
        ``(own, shared)``: classifiers with one head for each task, and those that all experiences share and that grow
        with the classes seen.
    """
    own = [name for name, module in model.named_modules() if isinstance(module, MultiHeadClassifier)]
    shared = [
        name
        for name, module in model.named_modules()
        if isinstance(module, IncrementalClassifier) and not any(name.startswith(f"{head}.") for head in own if head)
    ]
    if "" in own:  # the model is nothing but a classifier
        shared = []
    return own, shared
