"""Which modules of an Avalanche model are heads."""

from __future__ import annotations

from typing import Any

from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
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


def own_name(model: nn.Module, experience: Any, named: bool = False) -> str | None:
    """Name of an experience under which it has columns of its own: the label of its task, where heads are per task.

    Args:
        model: the network.
        experience: of an Avalanche stream.
        named: whether heads are named by the user.

    Returns:
        ``None`` where a head is shared, or where the experience holds samples of several tasks.
    """
    own, shared = find_heads(model)
    per_task = bool(own) or (named and any(isinstance(module, MultiTaskModule) for module in model.modules()))
    labels = task_names(experience)
    return labels[0] if per_task and not shared and len(labels) == 1 else None


def task_names(experience: Any) -> list[str]:
    """Labels of an experience's tasks."""
    labels = getattr(experience, "task_labels", None)
    return [str(label) for label in (labels if labels is not None else [0])]
